"""What pruning is asked for. The dataclasses are the schema of command line and YAML alike; ``prune`` and the one-shot
stage of a recovery share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from obsdiff.errors import UserError
from obsdiff.names import SUB_BLOCK, SWEEPING_METHODS
from obsdiff.numbers import check_whole

FORWARD, BACKWARD = "forward", "backward"  # ways to scan


@dataclass
class CalibrationOptions:
    """How layer inputs are measured.

    Args:
        prompts: Prompt set: a .txt, .csv, .tsv, .jsonl or .parquet file, a Hugging Face dataset (owner/name), or an
            embedded one (digits-train, digits-heldout). Default: the pipeline's own set, if it has one.
        column: Caption column of a table or dataset.
        num_prompts: Prompts to draw.
        steps: Denoising steps; default: the pipeline's own.
        guidance_scale: Classifier-free guidance; default: the pipeline's own.
        batch_size: Prompts per pipeline call; changes speed and memory only.
        packages: Calibration passes; later layers are measured with earlier ones pruned. Default: 4 for obs-diff as
            published, unless statistics are kept or an allocation needs one calibration; 1 for the others.
        streamed: Go through the denoiser stage by stage: its calls are recorded once, and each stage is measured on
            what the pruned ones before it make of them. Holds the statistics of one stage, and the recorded calls;
            chosen where device_memory or host_memory does not hold more, and nobody said how many packages.
        calls_on_disk: What a stage answers to the recorded calls waits for the next one on the output's disk, in a file
            without a name, in place of the host's memory; chosen where host_memory does not hold it. Needs streamed.
        tokens: Tokens drawn of each sequence at each call; default: all.
        padding: Count what prompts are padded with as tokens too, as published; for denoisers that attend to it.
        weighting: Timestep weights: log_decrease, log_increase, linear_decrease, linear_increase or uniform, with
            another range than 0.8-1.2 as log_decrease:0.2-1.8, a list of one for each step, or measured on the model.
            Default: that of the stored statistics, else the method's own (uniform for sparsegpt, log_decrease for
            the others).
        precision: Of the products that make Hessians, and of the blocks' linear layers meanwhile: float32, or what they
            multiply rounded to tf32 (CUDA) or bfloat16 (CPUs with AMX) with sums in float32, where the device has such
            products; layers that read one vector a call stay in float32. Or int8 (CPUs with VNNI), of Hessians alone:
            each input is rounded to 8 bits of the largest of its channel in a call of 32 rows and more, so batches and
            processes change what is rounded away; sums are exact. Default: that of the stored statistics, else float32.
        damping: Dampening relative to the mean of a Hessian's diagonal.
    """

    prompts: str | None = None
    column: str | None = None
    num_prompts: int = 100
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4
    packages: int | None = None
    streamed: bool = False
    calls_on_disk: bool = False
    tokens: int | None = None
    padding: bool = False
    weighting: str | None = None
    precision: str | None = None
    damping: float = 0.01


@dataclass
class EvaluationOptions:
    """How the result is measured, dense against pruned on the same prompts and seeds.

    Args:
        num_images: Images of each; 0 skips the evaluation.
        prompts: Prompt set, as for the calibration. Default: the pipeline's own, else the calibration prompts.
        column: Caption column of a table or dataset.
        seed: Noise seed of the first image; the others count up.
        batch_size: Images per pipeline call.
        measures: What is measured: mse, ssim, lpips, distance, alignment, clip_score, frechet, kid, precision (and
            recall), cmmd; with @EXTRACTOR, such as frechet@inception or distance@dinov2, by a named network. Default:
            what the pipeline's own classifier of images gives, else mse and ssim.
        extractors: Where the weights of named networks are (inception, inception-legacy, clip, dinov2, efficientnet):
            a file, a folder or a hub id.
        real: Real images for the measures with a named network: a folder, a parquet file, a Hugging Face dataset
            (owner/name), or an .npz with statistics of clean-fid.
        real_column: Image column of a table or dataset; default: image or img, whichever is there.
        real_split: Which split.
        real_cache: Folder to keep the features of real images in, by their content.
    """

    num_images: int = 64
    prompts: str | None = None
    column: str | None = None
    seed: int = 1000
    batch_size: int = 32
    measures: list[str] = field(default_factory=list)
    extractors: Mapping[str, str] = field(default_factory=dict)
    real: str | None = None
    real_column: str | None = None
    real_split: str = "train"
    real_cache: str | None = None


@dataclass(frozen=True)
class ScanOptions:
    """How layers' sensitivity is measured, for the measured allocation.

    Args:
        levels: Shares removed at which a forward scan runs the denoiser; default: 0.5, 0.8, 0.98 (structured: 0.25,
            0.5, 0.75, beside ranks also 0.9 and 0.98; ranks: 0.5, 0.75, 0.85, 0.95).
        triples: Recorded (latent, step, prompt) triples to measure on, for depth too; default: 160, or fewer where the
            scan would run the denoiser on more than 12 times what a calibration pass does.
        by: forward (the denoiser runs at a few shares, on all triples) or backward (errors are predicted from gradients
            of its output, and it runs at the largest share, on 32 of the triples; where that costs less).
    """

    levels: Sequence[float] | None = None
    triples: int | None = None
    by: str = FORWARD


@dataclass(frozen=True)
class Limits:
    """What an allocation may not change; keys and rules are shell patterns of names.

    Args:
        floors: Least share to remove; the last pattern that matches a name holds.
        ceilings: Largest share to remove; the last pattern that matches a name holds; 0 spares a layer.
        share: The layers (structured: modules) that one of these patterns matches get the same value.
        choices: N:M only: what a layer may get, such as [dense, 2:4], which sparse tensor cores run; default: dense and
            every N of M.
    """

    floors: Mapping[str, float] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)
    share: Sequence[str] = field(default_factory=list)
    choices: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReconstructionOptions:
    """How stages are brought, one after the other, to give what the dense ones give.

    Args:
        closed_form: First solve each layer again, on what was pruned in front of it, for the dense layer's outputs.
        steps: Of Adam for each stage, with a batch of recorded calls each; 0 for none.
        lr: Peak learning rate; it falls to zero along a cosine.
        triples: Recorded (latent, step, prompt) triples; a fifth of them only tells whether it helped.
        batch_size: Triples of one step.
    """

    steps: int = 0
    lr: float = 1e-3
    triples: int = 640
    batch_size: int = 32
    closed_form: bool = False

    @property
    def asked(self) -> bool:
        """Whether there is one."""
        return self.closed_form or self.steps > 0


@dataclass(kw_only=True)
class PruningOptions:
    """Prune in one shot.

    Args:
        pattern: unstructured:RATIO, N:M, structured:RATIO, structured:heads=R,ffn=R[,multiple_of=W], rank:RANK or
            rank:SHARE (of what modulations read, kept), lowrank:RANK or lowrank:SHARE (of the tokens that queries, keys
            and values read), or a sum such as structured:RATIO+rank:RANK. With a budget "structured", "rank" and
            "structured+rank+lowrank" will do. depth:STAGES or depth:SHARE removes whole blocks, alone or before one of
            these (depth:2+structured:0.3). N:M or unstructured:RATIO after structured or rank (structured+rank+2:4)
            prunes single weights of what those leave of each layer.
        method: obs (ours), obs-diff (as published), admm, sparsegpt, wanda, dsnot, taylor, diff-pruning, ecodiff,
            magnitude, l1 or random. Those that cut heads and neurons: obs, obs-diff, taylor, diff-pruning, ecodiff,
            magnitude, l1, random; taylor and diff-pruning measure gradients of the denoising loss, ecodiff learns
            gates of heads and neurons, each in a pass of its own.
        plan: YAML file with a pattern by layer, such as an earlier run's plan.yaml; stands in place of pattern.
        allocation: uniform (every layer the same), measured (by a sensitivity scan, where it hurts least) or owl (by
            outliers of each block). Default: measured for obs and admm, but uniform for N:M, for several packages and
            for the other methods, which are published so.
        budget: sparsity:SHARE (of the chosen layers, removed), parameters:SHARE, bytes:SHARE, flops:SHARE or
            latency:SHARE (of the denoiser, kept; the last three for structured patterns); of pattern only the kind then
            counts. Default: what pattern costs when it is uniform.
        scan: How sensitivity is measured.
        limits: What an allocation may not change.
        seed: Seed of calibration noise and of random methods.
        refit: Least squares on the kept weights; default: on for obs and admm.
        refit_steps: Conjugate-gradient steps of it on single weights, at most; default: as many as pay, at most 8.
        include: Names of layers (structured: of attention and feed-forward modules) to prune, as shell patterns.
        exclude: Names to leave alone, as shell patterns.
        spare_blocks: Blocks to leave alone, negative from the end. Default: first and last for structured patterns,
            none with the measured allocation and for depth.
        compared_columns: Columns whose scores are compared jointly where single weights go, a multiple of 32; default:
            the method's own (32 for obs, 128 for obs-diff and sparsegpt; the others compare otherwise).
        fusion: Ranking of heads over the two streams of joint attention: reciprocal_rank or relative_error.
        dead: What becomes of layers that reach no output of the denoiser, such as the end of Qwen-Image's text stream:
            report them, remove them (their weights become zero; structured: modules of nothing else are cut to the
            least), or ignore, which does not look for them.
        calibration: How layer inputs are measured.
        reconstruction: How stages are brought to the dense ones, before anything else is trained.
    """

    pattern: str = "unstructured:0.5"
    method: str = "obs"
    plan: str | None = None
    allocation: str | None = None
    budget: str | None = None
    scan: ScanOptions = field(default_factory=ScanOptions)
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    refit: bool | None = None
    refit_steps: int | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    spare_blocks: list[int] | None = None
    compared_columns: int | None = None
    fusion: str = "reciprocal_rank"
    dead: str = "report"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)


@dataclass(kw_only=True)
class PruneOptions(PruningOptions):
    """Prune a pipeline in one shot.

    Args:
        pipeline: An embedded pipeline (digits-sd3), a folder, or a hub id (owner/name).
        output: Folder for the results; must be new, empty, or (with overwrite) an earlier run.
        device: cpu, cuda, cuda:NUMBER or mps (which lacks the float64 that solving needs); default: cuda if there is
            one, else cpu. With several processes (torchrun) each takes its own cuda device.
        dtype: float32, bfloat16 or float16; statistics and solves are float32 always. Default: as saved by an earlier
            run, else float32.
        variant: Weight files to load, such as fp16; default: the plain ones, or the only variant that a folder has.
        denoiser: A .safetensors file with the denoiser's weights, in place of the pipeline's own.
        statistics: Folder to keep the calibration in; an existing one is used instead of calibrating again.
        sensitivity: Folder to keep the scan in, and what was timed for a latency budget; what an existing one holds is
            not measured again.
        overwrite: Replace an earlier run in the output folder.
        prune_again: Allow a pipeline that is pruned already.
        device_memory: What a cuda device may hold, such as 24GB, 24GiB or bytes: batch sizes (up to those that are
            given) and, where nobody says, calibration.streamed, or calibration.packages for what has no stages, are
            chosen to fit, and what cannot fit is refused.
        host_memory: The same for the host's memory, and for runs on the cpu.
        offload: Let weights rest in host memory, and have on the device one block at a time, for pipelines that are
            larger than it; needs calibration.streamed.
        weights_on_disk: For runs on the cpu: once they are loaded, let weights rest on the output's disk, in a file
            without a name, and have one block at a time in memory until all are written. The result is the same.
        dry_run: Say what the run would take of memory and time, from the pipeline's configs alone, and end; nothing is
            loaded, measured or written.
        evaluation: How the result is measured.
    """

    pipeline: str
    output: str
    device: str | None = None
    dtype: str | None = None
    variant: str | None = None
    denoiser: str | None = None
    statistics: str | None = None
    sensitivity: str | None = None
    overwrite: bool = False
    prune_again: bool = False
    device_memory: str | int | None = None
    host_memory: str | int | None = None
    offload: bool = False
    weights_on_disk: bool = False
    dry_run: bool = False
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


def check_compared(method: str, columns: int) -> None:
    """Refuse a number of columns to compare that a method cannot do.

    Raises:
        UserError: It is no multiple of 32, or the method compares scores otherwise.
    """
    check_whole("compared_columns", columns, SUB_BLOCK)
    if method not in SWEEPING_METHODS:
        raise UserError(
            f"compared_columns belongs to {', '.join(SWEEPING_METHODS)}; {method} compares scores otherwise"
        )
    if columns % SUB_BLOCK:
        raise UserError(f"compared_columns is {columns}; it must be a multiple of {SUB_BLOCK}")
