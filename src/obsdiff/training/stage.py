"""The one-shot stage of a recovery: prune once, keep the result, and find it again on every later start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.allocation.planning import rule_of
from obsdiff.allocation.stage import announce, calibration_prompts, measures, prepare, prune_stage
from obsdiff.errors import UserError
from obsdiff.files import read_json, whole_folder, write_json
from obsdiff.pruning.folder import MASKS, load_pipeline, run_folder, write_pipeline
from obsdiff.pruning.manifest import FILE, read_manifest
from obsdiff.pruning.masks import load_masks
from obsdiff.pruning.options import PruningOptions
from obsdiff.ranks import rank, wait_for_all

PRUNED, STATISTICS, SENSITIVITY = "pruned", "statistics", "sensitivity"


@dataclass(frozen=True)
class Start:
    """What a recovery starts from.

    Attributes:
        pipe: The pipeline to train, pruned or not.
        folder: The prune run it comes from, or None.
        manifest: Its manifest; empty for a pipeline that is not pruned.
        masks: Bool by layer (True = kept) for weights that are zero and stay so.
        dense: Name of the dense pipeline it was made of.
    """

    pipe: Any
    folder: Path | None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    dense: str = ""


def start_from(
    pipeline: str, options: PruningOptions | None, output: Path, device: str, may_prune: bool, overwrite: bool
) -> Start:
    """Load what is to be recovered; prune it first if that was not done before.

    Args:
        pipeline: The dense pipeline, or a prune run's folder (then ``options`` must be None).
        options: How to prune; None takes the pipeline as it is.
        output: The run's folder; the pruned pipeline is kept in ``pruned``, the calibration in ``statistics``, the
            scan of a measured allocation in ``sensitivity``.
        device: Where to calibrate and train.
        may_prune: Prune if it was not done before (fit), instead of refusing (validate, test, predict).
        overwrite: Prune again if an earlier run in ``output`` pruned otherwise.

    Raises:
        UserError: It cannot be pruned so, or ``output`` holds something pruned otherwise.
    """
    given = run_folder(pipeline)
    if options is None:
        return _opened(given, pipeline, device)
    if given is not None:
        raise UserError(f"{pipeline} is pruned already; leave out --model.pruning, or name a dense pipeline")
    folder = output / PRUNED
    wanted = {"pipeline": pipeline, **asdict(options)}
    if (folder / FILE).exists():
        found = read_manifest(folder).get("request")
        if found == wanted:
            return _opened(folder, pipeline, device)
        if not (overwrite and may_prune):
            raise UserError(
                f"{folder} was pruned with other settings ({_difference(found or {}, wanted)}); use the same, another "
                "--model.output, or --model.overwrite true"
            )
    elif not may_prune:
        raise UserError(f"{folder} not found; run fit first, with the same --model.output")
    _prune(pipeline, options, output, folder, device, wanted)
    return _opened(folder, pipeline, device)


def _prune(
    pipeline: str, options: PruningOptions, output: Path, folder: Path, device: str, request: Mapping[str, Any]
) -> None:
    """Calibrate and prune on all processes, and keep the result."""
    pipe = load_pipeline(pipeline, device=device)
    wiring, plan = prepare(pipe, options)
    prompts = calibration_prompts(pipe, options)
    store = output / STATISTICS if options.calibration.packages == 1 and measures(options, None) else None
    scan = output / SENSITIVITY if rule_of(options) == "measured" else None
    if rank() == 0:
        announce(pipe, wiring, plan, options, len(prompts), store)
    report = prune_stage(pipe, options, prompts, statistics=store, sensitivity=scan, quiet=rank() > 0)
    if rank() == 0:
        with whole_folder(folder, FILE, replace=True) as temporary:
            write_pipeline(pipe, temporary, report)
            manifest = read_json(temporary / FILE, "a manifest")
            write_json(temporary / FILE, {**manifest, "request": request})
    wait_for_all()


def _opened(folder: Path | None, pipeline: str, device: str) -> Start:
    if folder is None:
        return Start(load_pipeline(pipeline, dtype="float32", device=device), None, dense=pipeline)
    pipe = load_pipeline(folder, dtype="float32", device=device)
    manifest = read_manifest(folder)
    masks = {} if manifest["shrunk"] is not None else load_masks(folder / MASKS)
    return Start(pipe, folder, manifest, masks, str(manifest.get("pipeline") or pipeline))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    differing = [f"{key}: {found.get(key)} there, {now} now" for key, now in wanted.items() if found.get(key) != now]
    return "; ".join(text if len(text) < 90 else text[:87] + "..." for text in differing)
