"""Mistakes in the options of a command that are answered before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from obsdiff.allocation.request import check_evaluation, check_offload, check_precision_name, check_values
from obsdiff.cli.options import BenchOptions, BenchScanOptions, EvaluateOptions, InspectOptions, SampleOptions
from obsdiff.compare.cells import check
from obsdiff.compare.options import CompareOptions
from obsdiff.errors import UserError
from obsdiff.files import check_writable
from obsdiff.models.loading import check_denoiser_file, check_loading, check_source
from obsdiff.names import METHODS, PRESETS
from obsdiff.numbers import check_number, check_seed, check_whole, parse_bytes
from obsdiff.obs.pattern import parse_pattern
from obsdiff.paths import new_folder, user_path
from obsdiff.pruning.options import PruneOptions

MOST_IMAGES = 10**6
PROMPT_FILES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def checked_prune(options: PruneOptions) -> PruneOptions:
    """The options with ``~`` filled in.

    Raises:
        UserError: A value is wrong, or a file is missing.
    """
    output = new_folder(options.output, "output")
    check_loading(options.dtype, options.device)
    check_values(options)
    for name, size in (("device_memory", options.device_memory), ("host_memory", options.host_memory)):
        if size is not None:
            parse_bytes(name, size)
    check_evaluation(options.evaluation)
    calibration, evaluation = options.calibration, options.evaluation
    check_offload(options)
    return replace(
        options,
        pipeline=check_source(options.pipeline),
        denoiser=_denoiser(options.denoiser),
        output=str(output),
        statistics=_optional(options.statistics, "statistics", whole=True),
        sensitivity=_optional(options.sensitivity, "sensitivity"),
        calibration=replace(calibration, prompts=_prompts(calibration.prompts, "calibration.prompts")),
        evaluation=replace(evaluation, prompts=_prompts(evaluation.prompts, "evaluation.prompts")),
    )


def checked_compare(options: CompareOptions) -> CompareOptions:
    """The options with ``~`` filled in.

    Raises:
        UserError: A value is wrong, or a file is missing.
    """
    check(options)
    output = user_path(options.output, "output")
    check_writable(output)
    calibration, evaluation = options.calibration, options.evaluation
    return replace(
        options,
        pipeline=check_source(options.pipeline),
        output=str(output),
        calibration=replace(calibration, prompts=_prompts(calibration.prompts, "calibration.prompts")),
        evaluation=replace(evaluation, prompts=_prompts(evaluation.prompts, "evaluation.prompts")),
    )


def checked_sample(options: SampleOptions) -> SampleOptions:
    """The options with ``~`` filled in, and the prompts as a list, empty ones where only a number was given.

    Raises:
        UserError: A value is wrong, or a file is missing.
    """
    if options.num_images is not None:
        check_whole("num_images", options.num_images, 1, MOST_IMAGES)
        if options.prompt is not None:
            raise UserError("give --prompt or --num_images, not both: there is one image per prompt")
    prompts = [options.prompt] if isinstance(options.prompt, str) else list(options.prompt or ())
    if not prompts and options.num_images is None:
        raise UserError("no prompt given; pass --prompt TEXT, or --num_images for a pipeline that takes none")
    if isinstance(options.prompt, str) and options.prompt.startswith("[") and options.prompt.endswith("]"):
        raise UserError(
            f"--prompt {options.prompt[:60]} is no list of texts; quote what could be a number or a word of "
            "YAML: ['7', 'null']"
        )
    if blank := [prompt for prompt in prompts if not prompt.strip()]:
        raise UserError(f"--prompt holds an empty prompt {blank[0]!r}; say what to draw")
    check_seed("seed", options.seed)
    if options.steps is not None:
        check_whole("steps", options.steps)
    if options.guidance_scale is not None:
        check_number("guidance_scale", options.guidance_scale, 0.0)
    check_loading(options.dtype, options.device)
    output = user_path(options.output, "output")
    prompts = prompts or [""] * (options.num_images or 0)
    source, denoiser = check_source(options.pipeline), _denoiser(options.denoiser)
    return replace(options, pipeline=source, denoiser=denoiser, prompt=prompts, output=str(output))


def checked_evaluate(options: EvaluateOptions) -> EvaluateOptions:
    """The options with ``~`` filled in.

    Raises:
        UserError: A value is wrong, or something is missing.
    """
    check_loading(options.dtype, options.device)
    check_evaluation(options.evaluation)
    check_whole("evaluation.num_images", options.evaluation.num_images, 1)
    evaluation = replace(options.evaluation, prompts=_prompts(options.evaluation.prompts, "evaluation.prompts"))
    against = options.against
    if against not in (None, "none"):
        against = check_source(against, "against")
    output, images = (
        None if place is None else str(new_folder(place, name))
        for name, place in (("output", options.output), ("images", options.images))
    )
    if options.layout != "plain" and images is None:
        raise UserError("layout says how images lie in a folder; name it with --images")
    if options.overwrite and output is None:
        raise UserError("overwrite replaces an earlier evaluation; name its folder with --output")
    source = check_source(options.pipeline)
    return replace(options, pipeline=source, against=against, output=output, images=images, evaluation=evaluation)


def checked_inspect(options: InspectOptions) -> InspectOptions:
    """The options with ``~`` filled in.

    Raises:
        UserError: Nothing is there.
    """
    if options.folder is None or options.families:
        if options.families and options.folder is None:
            return options
        raise UserError("give the folder of a prune run or a plan file, or --families; one of them")
    folder = user_path(options.folder, "folder")
    if not folder.exists():
        raise UserError(f"{folder} not found; give the folder of a prune run, or a plan file (.yaml)")
    return replace(options, folder=str(folder))


def check_bench(options: BenchOptions | BenchScanOptions) -> None:
    """Refuse wrong values.

    Raises:
        UserError: Naming the first one.
    """
    if options.preset is not None and options.preset not in PRESETS:
        raise UserError(f"unknown preset {options.preset!r}; choose one of {', '.join(PRESETS)}")
    if options.method not in METHODS:
        raise UserError(f"unknown method {options.method!r}; choose one of {', '.join(METHODS)}")
    parse_pattern(options.pattern)
    check_loading(options.dtype, options.device)
    for name in ("num_prompts", "steps", "batch_size", "threads", "packages", "stages", "side"):
        if (value := getattr(options, name, None)) is not None:
            check_whole(name, value, 1, 10**9)
    if isinstance(options, BenchOptions):
        check_precision_name("precision", options.precision)
        if options.streamed and (options.packages > 1 or options.statistics is not None):
            raise UserError(
                "a streamed calibration goes stage by stage and keeps nothing; leave out packages, statistics"
            )
        if options.calls_on_disk and not options.streamed:
            raise UserError("calls_on_disk is of a streamed calibration's calls; leave it out, or add --streamed true")
        _optional(options.statistics, "statistics", whole=True)
    elif options.pipeline is not None:
        check_source(options.pipeline)


def check_on_cpu(option: str, device: str) -> None:
    """Refuse an option that is for the host's memory alone.

    Raises:
        UserError: The run is on a device that has its own.
    """
    if not device.startswith("cpu"):
        raise UserError(f"--{option} is for runs on the cpu, and this one is on {device}; leave it out (prune has "
                        "--offload true for a device)")  # fmt: skip


def _denoiser(file: str | None) -> str | None:
    path = check_denoiser_file(file)
    return None if path is None else str(path)


def _optional(path: str | None, option: str, whole: bool = False) -> str | None:
    return None if path is None else str((new_folder if whole else user_path)(path, option))


def _prompts(source: str | None, option: str) -> str | None:
    """A prompt set's name, ``~`` filled in; a file that is missing is refused."""
    if source is None:
        return None
    path = user_path(source, option)
    looks_like_file = path.suffix.lower() in PROMPT_FILES or source.startswith((".", "/", "~"))
    if looks_like_file and not path.exists():
        raise UserError(f"{option}: {path} not found")
    return str(path) if source.startswith("~") else source


def kept(*folders: str | None, output: str | None = None, solved: Path | None = None) -> str:
    """What an interrupted run has kept in folders that were named for it, and of what it solves."""
    full = [folder for folder in folders if folder is not None and _holds_something(Path(folder))]
    measured = "measured"
    if solved is not None and any(solved.glob("*.safetensors")):  # it holds more than its index
        measured, full = "measured and solved" if full else "solved", [*full, str(solved)]
    nothing = f"nothing was written to {output}" if output is not None and not _holds_something(Path(output)) else ""
    there = f"what was {measured} is kept in {' and '.join(full)}, the same command goes on from there" if full else ""
    return "; ".join(part for part in (nothing, there) if part)


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
