"""The one-shot stage of a recovery: prune once, keep the result, and find it again on every later start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from obsdiff.allocation.announce import announce
from obsdiff.allocation.planning import packages_for, rule_of
from obsdiff.allocation.stage import (
    Folders,
    calibration_prompts,
    measures,
    needs_prompts,
    prepare,
    prune_stage,
)
from obsdiff.errors import UserError
from obsdiff.files import check_folder, check_writable, read_json, whole_folder, write_json
from obsdiff.memory import freed_at_once
from obsdiff.models.content import component_hashes
from obsdiff.models.released import release, share
from obsdiff.models.subject import Subject, subject_of
from obsdiff.pruning.finished import remove_finished
from obsdiff.pruning.folder import MASKS, load_pipeline, run_folder, write_pipeline
from obsdiff.pruning.manifest import FILE, read_manifest
from obsdiff.pruning.masks import load_masks, weight_masks
from obsdiff.pruning.oneshot import zeroed_layers
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.solved import remove_solved
from obsdiff.pruning.statistics import model_hash
from obsdiff.ranks import rank, wait_for_all

PRUNED, STATISTICS, SENSITIVITY = "pruned", "statistics", "sensitivity"
RECONSTRUCTION, SOLVED = "reconstruction", "solved"
REFERENCES = "references.safetensors"


@dataclass(frozen=True)
class Start:
    """What a recovery starts from.

    Attributes:
        subject: The pipeline to train, pruned or not.
        folder: The prune run it comes from, or None.
        manifest: Its manifest; empty for a pipeline that is not pruned.
        masks: Bool by layer (True = kept) for weights that are zero and stay so.
        dense: Name of the dense pipeline it was made of.
        content: Hashes of the pipeline's components, as it was before training.
        teacher: The dense pipeline, float32; None where nothing is trained.
    """

    subject: Subject
    folder: Path | None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    dense: str = ""
    content: Mapping[str, str] = field(default_factory=dict)
    teacher: Subject | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline to train."""
        return self.subject.pipe


def start_from(
    pipeline: str,
    options: PruningOptions | None,
    output: Path,
    device: str,
    overwrite: bool,
    check: Callable[[Subject], None] | None,
) -> Start:
    """Load what is to be recovered; prune it first if that was not done before.

    What was pruned before is found again by the *content* of the dense pipeline, of the calibration's prompts and of a
    plan file, not by what they are called.

    Args:
        pipeline: The dense pipeline, or a prune run's folder (then ``options`` must be None).
        options: How to prune; None takes the pipeline as it is.
        output: The run's folder; the pruned pipeline is kept in ``pruned``, the calibration in ``statistics``, the
            scan of a measured allocation in ``sensitivity``, and until it is finished a reconstruction in
            ``reconstruction``.
        device: Where to calibrate and train.
        overwrite: Prune again if an earlier run in ``output`` pruned otherwise.
        check: Called with the dense pipeline before anything expensive; raises where training could not go on. None
            (validate, test, predict): nothing is pruned.

    Raises:
        UserError: It cannot be pruned so, or ``output`` holds something pruned otherwise.
    """
    given = given_run(pipeline, options)
    if options is None:
        return _as_given(given, pipeline, device, check)
    folder = output / PRUNED
    options = settled(options)
    wanted = request_of(pipeline, options)
    found = request_in(read_manifest(folder)) if (folder / FILE).exists() else None
    if check is None:
        if found is None:
            raise UserError(f"{folder} not found; run fit first, with the same --model.output")
        _refuse_difference(folder, found, wanted)
        return _opened(folder, pipeline, device)
    with freed_at_once(options.calibration.streamed):
        dense = load_pipeline(pipeline, device=device)
        check(subject_of(dense))
        prompts = calibration_prompts(dense, options) if needs_prompts(options, None) else []
        wanted |= {"content": component_hashes(dense), "prompts_sha256": _digest("\0".join(prompts).encode())}
        if options.plan is not None:
            wanted["plan_sha256"] = _digest(Path(options.plan).read_bytes()) if Path(options.plan).is_file() else None
        if found is not None and not overwrite:
            _refuse_difference(folder, found, wanted)
        if found != wanted:
            check_folder(folder, FILE, "a pruned pipeline", replace=True)
            check_writable(folder)
            _prune(dense, prompts, options, output, folder, wanted)
            del dense  # before there is another one
            dense = load_pipeline(pipeline, dtype="float32", device=device)
    release(dense)  # what the two pipelines have in common is there once
    start = _opened(folder, pipeline, device)
    share(dense, start.pipe)
    return replace(start, teacher=subject_of(dense))


def given_run(pipeline: str, options: PruningOptions | None) -> Path | None:
    """The prune run that a pipeline's name leads to, or None.

    Raises:
        UserError: There is one, and it is to be pruned.
    """
    given = run_folder(pipeline)
    if given is not None and options is not None:
        raise UserError(f"{pipeline} is pruned already; leave out --model.pruning, or name a dense pipeline")
    return given


def pruned_before(folder: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a folder holds what is wanted, as far as options tell.

    Raises:
        UserError: It holds something pruned otherwise, and may not be replaced.
    """
    if not (folder / FILE).exists():
        return False
    found = request_in(read_manifest(folder))
    if not overwrite:
        _refuse_difference(folder, found, wanted)
    return all(found.get(key) == value for key, value in wanted.items())


def settled(options: PruningOptions) -> PruningOptions:
    """The options with what the method's row fills in."""
    packages = None if options.calibration.streamed else packages_for(options, None)
    return replace(options, calibration=replace(options.calibration, packages=packages))


def store_of(options: PruningOptions, output: Path) -> Path | None:
    """Where a recovery keeps its calibration; None where nothing is measured once for all."""
    return output / STATISTICS if options.calibration.packages == 1 and measures(options, None) else None


def request_of(pipeline: str, options: PruningOptions) -> dict[str, Any]:
    """What a run's pruning is remembered by, JSON-able, besides the content of what it was done to."""
    return _same_result({"pipeline": pipeline, **asdict(settled(options))})


def _same_result(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request without what changes no bit of the result: where the calls of a streamed calibration wait. (Batches
    change the order of sums.)"""
    calibration = {k: v for k, v in request["calibration"].items() if k != "calls_on_disk"}
    return {**request, "calibration": calibration}


def request_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The request that a manifest keeps, or {}; options that came since are at their defaults in it."""

    def filled(found: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        both = {
            k: filled(v, usual[k]) for k, v in found.items() if isinstance(v, dict) and isinstance(usual.get(k), dict)
        }
        return {**usual, **found, **both}

    found = manifest.get("request")
    return _same_result(filled(found, asdict(PruningOptions()))) if found else {}


def _as_given(given: Path | None, pipeline: str, device: str, check: Callable[[Subject], None] | None) -> Start:
    start = _opened(given, pipeline, device)
    if check is None:
        return start
    release(start.pipe)
    dense = load_dense(start, device)
    share(start.pipe, dense.pipe)
    check(dense)
    return replace(start, teacher=dense)


def load_dense(start: Start, device: str) -> Subject:
    """The dense pipeline that ``start`` was made of, float32.

    Raises:
        UserError: It is not what it was then.
    """
    dense = subject_of(load_pipeline(start.dense, dtype="float32", device=device))
    if start.folder is not None and (changed := _changed_since(start, dense)):
        raise UserError(
            f"{', '.join(changed)} of {start.dense} changed since {start.folder} was pruned from it, so it cannot be "
            "its teacher; prune again, or bring back what was there"
        )
    return dense


def dense_key(start: Start) -> Any:
    """What is known of the dense denoiser's content without loading it."""
    kept = (start.manifest.get("request") or {}).get("content")
    return kept or _dense_model(start.manifest) or start.content


def _dense_model(manifest: Mapping[str, Any]) -> str | None:
    """Hash of the denoiser that was pruned; statistics of a shorter one are of what was left of it."""
    found = (manifest.get("depth") or manifest.get("statistics") or {}).get("model")
    return None if found is None else str(found)


def _changed_since(start: Start, dense: Subject) -> list[str]:
    """Components of the dense pipeline that are not what ``start`` was made of, as far as its manifest tells."""
    if kept := (start.manifest.get("request") or {}).get("content"):
        now = component_hashes(dense.pipe)
        return [name for name in now | kept if now.get(name) != kept.get(name)]
    model = _dense_model(start.manifest)
    if model is None or start.manifest["dtype"] != "float32":  # then it was hashed in another dtype
        return []
    return [] if model_hash(dense.denoiser) == model else [str(start.manifest["component"])]


def _prune(
    pipe: Any, prompts: list[str], options: PruningOptions, output: Path, folder: Path, request: Mapping[str, Any]
) -> None:
    """Calibrate and prune on all processes, and keep the result."""
    subject, plan = prepare(pipe, options)
    store = store_of(options, output)
    scan = output / SENSITIVITY if rule_of(options) == "measured" else None
    if rank() == 0:
        announce(subject, plan, options, len(prompts), store)
    stages, solves = output / RECONSTRUCTION, output / SOLVED
    folders = Folders(store, scan, stages, solves, output)
    report = prune_stage(subject, options, prompts, folders, quiet=rank() > 0)
    if rank() == 0:
        with whole_folder(folder, FILE, replace=True) as temporary:
            write_pipeline(pipe, temporary, report)
            manifest = read_json(temporary / FILE, "a manifest")
            write_json(temporary / FILE, {**manifest, "request": request})
        remove_finished(stages)
        remove_solved(solves)
    wait_for_all()


def _opened(folder: Path | None, pipeline: str, device: str) -> Start:
    subject = subject_of(load_pipeline(folder or pipeline, dtype="float32", device=device))
    content = component_hashes(subject.pipe)
    if folder is None:
        return Start(subject, None, masks=_masks(subject, {}), dense=pipeline, content=content)
    manifest = read_manifest(folder)
    masks = _masks(subject, weight_masks(load_masks(folder / MASKS), manifest["shrunk"] is not None))
    return Start(subject, folder, manifest, masks, str(manifest.get("pipeline") or pipeline), content)


def _masks(subject: Subject, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a run, and of layers pruned elsewhere or before: their zeros must not train back either."""
    graph = subject.graph
    found = {layer: graph.weight(layer).detach().ne(0).cpu() for layer in zeroed_layers(graph) if layer not in known}
    if found:
        rank_zero_warn(
            f"{len(found)} layers, such as {next(iter(found))}, hold zeros that no mask of this run covers; they stay "
            "zero in training"
        )
    return {**known, **found}


def _refuse_difference(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    texts = []
    for key, now in wanted.items():
        then = found.get(key)
        if then == now:
            continue
        if key == "content":
            names = [name for name in now | (then or {}) if now.get(name) != (then or {}).get(name)]
            texts.append(f"{', '.join(names)} of {wanted['pipeline']} changed since")
        elif key.endswith("_sha256"):
            texts.append(f"the content of the {key.removesuffix('_sha256')} changed since")
        else:
            text = f"{key}: {then} there, {now} now"
            texts.append(text if len(text) < 90 else text[:87] + "...")
    if texts:
        raise UserError(
            f"{folder} was pruned with other settings ({'; '.join(texts)}); use the same, another --model.output, or "
            "--model.overwrite true"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
