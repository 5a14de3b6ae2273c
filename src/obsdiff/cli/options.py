"""What the smaller commands accept. The fields are the schema of command line and YAML alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from obsdiff.pruning.options import FORWARD, EvaluationOptions


@dataclass
class SampleOptions:
    """Draw images.

    Args:
        pipeline: A prune run's folder, an embedded pipeline, any diffusers folder, or a hub id.
        prompt: What to draw; a YAML list for several images.
        num_images: How many to draw without a prompt, in place of ``prompt``.
        output: PNG file (one image) or folder (several).
        seed: Noise seed of the first image; the others count up.
        steps: Denoising steps; default: the pipeline's own.
        guidance_scale: Classifier-free guidance; default: the pipeline's own.
        device: cpu, cuda, cuda:NUMBER or mps; default: what is there, in the order cuda, mps, cpu.
        dtype: float32, bfloat16 or float16.
        variant: Weight files to load, such as fp16; default: the plain ones, or the only variant that a folder has.
        denoiser: A .safetensors file with the denoiser's weights, in place of the pipeline's own.
        overwrite: Replace existing files.
    """

    pipeline: str
    prompt: list[str] | str | None = None
    num_images: int | None = None
    output: str = "sample.png"
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    device: str | None = None
    dtype: str | None = None
    variant: str | None = None
    denoiser: str | None = None
    overwrite: bool = False


@dataclass
class EvaluateOptions:
    """Measure a pipeline: against the dense one, against its prompts, against real images.

    Args:
        pipeline: A prune run's or a recovery's folder, an embedded pipeline, any diffusers folder, or a hub id.
        against: The dense pipeline, whose images of the same prompts and seeds are compared; default: the one that the
            run was made of; none compares with none.
        output: Folder for evaluation.json, evaluation.md and samples.png; default: only the figures are printed.
        evaluation: What is measured, and on what.
        scorers: Commands of other programs that score images, by the name of their figure. Each is called with a folder
            of PNG files and metadata.jsonl (file_name, prompt) and prints a JSON list of numbers.
        images: Folder for all images of the pipeline.
        layout: How they lie there: plain (00000.png and metadata.jsonl), geneval or dpg, as these benchmarks want
            them; for these evaluation.prompts names their evaluation_metadata.jsonl or dpg_bench.csv.
        latency: Time one call of the denoisers, in turns.
        device: cpu, cuda, cuda:NUMBER or mps; default: what is there, in the order cuda, mps, cpu.
        dtype: float32, bfloat16 or float16; default: as saved.
        overwrite: Replace an earlier evaluation in the output folder.
    """

    pipeline: str
    against: str | None = None
    output: str | None = None
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    scorers: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    layout: str = "plain"
    latency: bool = True
    device: str | None = None
    dtype: str | None = None
    overwrite: bool = False


@dataclass
class InspectOptions:
    """Show what was done to a pipeline, layer by layer, or what can be done to which.

    Args:
        folder: A prune run's folder, or a plan file (.yaml).
        families: In place of a folder: a table of the denoisers that are known, and what each supports.
    """

    folder: str | None = None
    families: bool = False


@dataclass
class BenchOptions:
    """Measure the speed of pruning on a model with random weights; prints one JSON line.

    Args:
        preset: sd3-tiny-cpu, sd3-medium, sd35-large, sdxl, flux, qwen-image or wan-14b.
        pattern: As for prune.
        method: As for prune.
        packages: Calibration passes.
        streamed: Calibrate stage by stage instead, as prune's calibration.streamed.
        calls_on_disk: Recorded calls wait on the disk of the working directory, as prune's calibration.calls_on_disk.
        weights_on_disk: Weights rest there, too, as prune's weights_on_disk.
        stages: Keep so many blocks of each list, of their true shapes, so that a large model starts anywhere.
        side: Pixels along a side of the images; default: the preset's.
        device: Such as cpu or cuda; default: the preset's.
        dtype: Default: the preset's.
        precision: Of the products that make Hessians, as prune's calibration.precision.
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
    streamed: bool = False
    calls_on_disk: bool = False
    weights_on_disk: bool = False
    stages: int | None = None
    side: int | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    num_prompts: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    statistics: str | None = None


@dataclass
class BenchScanOptions:
    """Measure the cost of a sensitivity scan over a calibration, and whether its errors add up; prints one JSON line.

    Args:
        preset: Random weights in the shape of a preset of bench prune; default: sd3-tiny-cpu.
        pipeline: An embedded pipeline, a folder, or a hub id, with its own prompts; in place of a preset.
        pattern: As for prune.
        method: As for prune.
        triples: Recorded calls to measure on; default: as for prune.
        by: forward or backward, as prune's scan.by.
        plans: Random plans whose predicted and measured errors are compared.
        device: cpu, cuda or cuda:NUMBER; default: the preset's; of a pipeline cuda if there is one, else cpu.
        dtype: Default: the preset's, or as the pipeline was saved.
        num_prompts: Default: the preset's, or 100.
        steps: Default: the preset's or the pipeline's.
        batch_size: Prompts per call; default: the preset's, or 4.
        threads: CPU threads; default: torch's own choice.
    """

    preset: str | None = None
    pipeline: str | None = None
    pattern: str = "unstructured:0.5"
    method: str = "obs"
    triples: int | None = None
    by: str = FORWARD
    plans: int = 0
    device: str | None = None
    dtype: str | None = None
    num_prompts: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    threads: int | None = None


@dataclass
class BenchTrainOptions:
    """Measure a training step with masks, without, with a teacher that runs, and in a plain loop; prints one JSON line.

    Args:
        pipeline: An embedded pipeline, a folder, or a hub id.
        pattern: unstructured:RATIO or N:M.
        prompts: Prompt set of the trajectories that are trained on.
        num_prompts: Prompts to draw.
        batch_size: Latents per step.
        steps: Timed steps in each round.
        rounds: Rounds of the four in turn.
    """

    pipeline: str = "digits-sd3"
    pattern: str = "unstructured:0.8"
    prompts: str = "digits-train"
    num_prompts: int = 20
    batch_size: int = 64
    steps: int = 20
    rounds: int = 5
