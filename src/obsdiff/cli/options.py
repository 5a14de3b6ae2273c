"""What ``obsdiff prune`` accepts. The fields are the schema of command line and YAML alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions


@dataclass
class ScanOptions:
    """How layers' sensitivity is measured, for the measured allocation.

    Args:
        levels: Shares removed at which the denoiser runs; default: 0.5, 0.8, 0.95 (structured: 0.25, 0.5, 0.75).
        triples: Recorded (latent, step, prompt) triples to measure on; default: 160, or fewer where the scan would run
            the denoiser on more than 12 times what a calibration pass does.
    """

    levels: list[float] | None = None
    triples: int | None = None


@dataclass
class LimitOptions:
    """What an allocation may not change.

    Args:
        floors: Least share to remove, by shell pattern of names; the last that matches holds.
        ceilings: Largest share to remove, by shell pattern of names; 0 spares a layer.
        share: Shell patterns; the layers (structured: modules) that one matches get the same value.
    """

    floors: dict[str, float] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    share: list[str] = field(default_factory=list)


@dataclass
class PruneOptions:
    """Prune a pipeline in one shot.

    Args:
        pipeline: An embedded pipeline (digits-sd3), a folder, or a hub id (owner/name).
        output: Folder for the results; must be new, empty, or (with overwrite) an earlier run.
        pattern: unstructured:RATIO, N:M, structured:RATIO, or structured:heads=R,ffn=R[,multiple_of=W].
        method: obs, admm, sparsegpt, wanda, magnitude or random.
        seed: Seed of calibration noise and of random methods.
        device: Such as cpu or cuda.
        dtype: float32, bfloat16 or float16; statistics and solves are float32 always. Default: as saved by an earlier
            run, else float32.
        plan: YAML file with a pattern by layer, such as an earlier run's plan.yaml; stands in place of pattern.
        allocation: uniform (every layer the same), measured (by a sensitivity scan, where it hurts least) or owl (by
            outliers of each block).
        budget: sparsity:SHARE (of the chosen layers, removed), parameters:SHARE, flops:SHARE or latency:SHARE (of the
            denoiser, kept; the last two for structured patterns); of pattern only the kind then counts. Default: what
            pattern costs when it is uniform.
        sensitivity: Folder to keep the scan in; an existing one is used instead of scanning again.
        scan: How sensitivity is measured.
        limits: What an allocation may not change.
        refit: Least squares on the kept weights; default: on for obs and admm.
        include: Names of layers (structured: of attention and feed-forward modules) to prune, as shell patterns.
        exclude: Names to leave alone, as shell patterns.
        spare_blocks: Blocks to leave alone, negative from the end. Default: first and last for structured patterns.
        fusion: Ranking of heads over the two streams of joint attention: reciprocal_rank or relative_error.
        statistics: Folder to keep the calibration in; an existing one is used instead of calibrating again.
        overwrite: Replace an earlier run in the output folder.
        prune_again: Allow a pipeline that is pruned already.
        calibration: How layer inputs are measured.
        evaluation: How the result is measured.
    """

    pipeline: str
    output: str
    pattern: str = "unstructured:0.5"
    method: str = "obs"
    plan: str | None = None
    allocation: str = "uniform"
    budget: str | None = None
    sensitivity: str | None = None
    scan: ScanOptions = field(default_factory=ScanOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    refit: bool | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    spare_blocks: list[int] | None = None
    fusion: str = "reciprocal_rank"
    statistics: str | None = None
    overwrite: bool = False
    prune_again: bool = False
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass
class SampleOptions:
    """Draw images.

    Args:
        pipeline: A prune run's folder, an embedded pipeline, any diffusers folder, or a hub id.
        prompt: What to draw; a YAML list for several images.
        output: PNG file (one prompt) or folder (several).
        seed: Noise seed of the first image; the others count up.
        steps: Denoising steps; default: the pipeline's own.
        guidance_scale: Classifier-free guidance; default: the pipeline's own.
        device: Such as cpu or cuda.
        dtype: float32, bfloat16 or float16.
        overwrite: Replace existing files.
    """

    pipeline: str
    prompt: list[str] | str
    output: str = "sample.png"
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False


@dataclass
class InspectOptions:
    """Show what was done to a pipeline, layer by layer.

    Args:
        folder: A prune run's folder, or a plan file (.yaml).
    """

    folder: str


@dataclass
class BenchOptions:
    """Measure the speed of pruning on a model with random weights; prints one JSON line.

    Args:
        preset: sd3-tiny-cpu, sd3-medium or sd35-large.
        pattern: As for prune.
        method: As for prune.
        packages: Calibration passes.
        device: Such as cpu or cuda; default: the preset's.
        dtype: Default: the preset's.
        num_prompts: Default: the preset's.
        steps: Default: the preset's.
        batch_size: Default: the preset's.
        threads: CPU threads; default: torch's own choice.
        statistics: Folder to keep the calibration in; a second run then times pruning from stored statistics.
    """

    preset: str = "sd3-tiny-cpu"
    pattern: str = "unstructured:0.5"
    method: str = "obs"
    packages: int = 1
    device: str | None = None
    dtype: str | None = None
    num_prompts: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    statistics: str | None = None


@dataclass
class BenchScanOptions:
    """Measure the cost of a sensitivity scan over a calibration, on a model with random weights; prints one JSON line.

    Args:
        preset: sd3-tiny-cpu, sd3-medium or sd35-large.
        pattern: As for prune.
        method: As for prune.
        triples: Recorded calls to measure on; default: as for prune.
        plans: Random plans whose predicted and measured errors are compared.
        device: Such as cpu or cuda; default: the preset's.
        dtype: Default: the preset's.
        num_prompts: Default: the preset's.
        steps: Default: the preset's.
        batch_size: Default: the preset's.
        threads: CPU threads; default: torch's own choice.
    """

    preset: str = "sd3-tiny-cpu"
    pattern: str = "unstructured:0.5"
    method: str = "obs"
    triples: int | None = None
    plans: int = 0
    device: str | None = None
    dtype: str | None = None
    num_prompts: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    threads: int | None = None


@dataclass
class BenchTrainOptions:
    """Measure a training step with masks, without, and in a plain Lightning loop; prints one JSON line.

    Args:
        pipeline: An embedded pipeline, a folder, or a hub id.
        pattern: unstructured:RATIO or N:M.
        prompts: Prompt set of the trajectories that are trained on.
        num_prompts: Prompts to draw.
        batch_size: Latents per step.
        steps: Timed steps in each round.
        rounds: Rounds of the three in turn.
    """

    pipeline: str = "digits-sd3"
    pattern: str = "unstructured:0.8"
    prompts: str = "digits-train"
    num_prompts: int = 20
    batch_size: int = 64
    steps: int = 20
    rounds: int = 5
