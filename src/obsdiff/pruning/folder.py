"""Pruned pipelines on disk: safetensors, a manifest, bit-packed masks; never a pickle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.files import check_folder, check_writable, read_json, whole_folder, write_json
from obsdiff.models import obsdiff_shrunk
from obsdiff.models.denoisers import dtype_of, parts_of, shrunk_of
from obsdiff.models.info import info_of, write_info
from obsdiff.models.loading import Weights, open_pipeline, split_source, to_device
from obsdiff.models.register import LIBRARY
from obsdiff.models.subject import graph_of, subject_of
from obsdiff.obs.pattern import of_units, parse_request
from obsdiff.paths import user_path
from obsdiff.pruning import planfile
from obsdiff.pruning.manifest import FILE, manifest_of, read_manifest
from obsdiff.pruning.masks import broken_masks, load_masks, save_masks, weight_masks
from obsdiff.pruning.plan import WEIGHT
from obsdiff.pruning.planfile import write_plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.statistics import model_hash

PIPELINE = "pipeline"
MASKS = "masks.safetensors"


def save_pipeline(pipe: Any, output: str | Path, report: PruneReport, *, overwrite: bool = False) -> None:
    """Write ``pipeline/`` (what diffusers loads), ``pruning.json``, ``plan.yaml`` and ``masks.safetensors``, all or
    nothing.

    Args:
        pipe: The pruned pipeline.
        output: Folder; must be new or empty unless ``overwrite`` is given and it holds an earlier run.
        report: What :func:`obsdiff.prune` returned.
        overwrite: Replace an earlier run there.

    Raises:
        UserError: The folder holds something else, or cannot be written.
    """
    check_output(Path(output), overwrite)
    with whole_folder(Path(output), FILE, replace=overwrite) as folder:
        write_pipeline(pipe, folder, report)


def check_output(output: Path, overwrite: bool, flag: str = "--overwrite true") -> None:
    """Refuse a folder that holds anything but an earlier run that may be replaced, or that cannot be written.

    Raises:
        UserError: It does.
    """
    check_folder(output, FILE, "a prune run", replace=overwrite, hint=flag)
    check_writable(output)


def write_pipeline(pipe: Any, folder: Path, report: PruneReport) -> None:
    """The files of :func:`save_pipeline`, into a folder that is there."""
    subject = subject_of(pipe)
    denoiser, kind = subject.denoiser, subject.family.denoiser
    write_pipeline_files(pipe, folder)
    save_masks(report.masks, folder / MASKS)
    manifest = manifest_of(report, info_of(pipe).source, subject.component, kind)
    manifest |= {"denoiser_sha256": model_hash(denoiser), "dtype": _dtype(denoiser)}
    write_json(folder / FILE, manifest)
    write_plan(report.plan, folder / planfile.FILE, kind, report.model)


def write_pipeline_files(pipe: Any, folder: Path) -> None:
    """``pipeline/``: what diffusers loads, with obsdiff's information, and the code of a shrunk denoiser."""
    target = folder / PIPELINE
    pipe.save_pretrained(target, safe_serialization=True)
    write_info(info_of(pipe), target)
    index = read_json(target / "model_index.json", "a pipeline's index")
    for component, denoiser in subject_of(pipe).components.items():
        if shrunk_of(denoiser) is not None:
            shutil.copyfile(str(obsdiff_shrunk.__file__), target / component / f"{LIBRARY}.py")
            index[component] = [LIBRARY, type(denoiser).__name__]
    write_json(target / "model_index.json", index)


def load_pipeline(
    source: Any,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    variant: str | None = None,
    denoiser: str | Path | None = None,
    parts: Mapping[str, Any] | None = None,
) -> Any:
    """Load a pipeline: an embedded one by name ("digits-sd3"), a prune run's folder, any diffusers folder, a hub id.

    Pruned pipelines come back exactly as they were saved, shrunk shapes included, and are checked against their
    manifest and masks.

    Args:
        source: The name or folder, or either "with FILE.safetensors" as ``denoiser``; a pipeline object is moved to
            ``device`` and returned.
        dtype: "float32", "bfloat16" or "float16"; None: what a prune run was saved in, else "float32".
        device: Such as "cpu" or "cuda".
        variant: Weight files to load, such as "fp16"; None: the plain ones, or the only variant of a folder.
        denoiser: A ``.safetensors`` file in place of the pipeline's denoiser.
        parts: Components to take instead of loading them, by name.

    Raises:
        UserError: Nothing loadable is called so, or the files do not belong together.
    """
    if isinstance(source, str) and denoiser is None:
        source, denoiser = split_source(source)
    weights = Weights(variant, denoiser, parts)
    if not isinstance(source, str | Path):
        if weights != Weights():
            raise UserError(
                "variant, denoiser and parts choose files; leave them out for a pipeline that is loaded already"
            )
        return to_device(source, device)
    folder = run_folder(source)
    if folder is None:
        return open_pipeline(source, dtype or "float32", device, weights=weights)
    if (variant, denoiser) != (None, None):
        raise UserError(f"{source} is a prune run, which has one set of weights; leave out variant and denoiser")
    manifest = read_manifest(folder)
    pipe = open_pipeline(folder / PIPELINE, dtype or manifest["dtype"], device, manifest, str(source), weights)
    check_against_manifest(pipe, folder, manifest)
    return pipe


def run_folder(source: str | Path) -> Path | None:
    """The folder of the prune run that ``source`` (it, or its ``pipeline/``) names; None if it is none."""
    path = user_path(source, "pipeline")
    for folder in (path, path.parent):
        if path.is_dir() and (folder / FILE).is_file() and (folder / PIPELINE).is_dir():
            return folder
    return None


def check_against_manifest(pipe: Any, folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse weights that are not those the manifest and the masks describe (to the bit, unless cast on loading).

    Args:
        pipe: The loaded pipeline.
        folder: The prune run's folder.
        manifest: Its manifest.

    Raises:
        UserError: They are not.
    """
    subject = subject_of(pipe)
    denoiser = subject.denoiser
    masks = load_masks(folder / MASKS)
    try:
        if (kind := subject.family.denoiser) != manifest["denoiser"]:
            raise _Unlike(f"the manifest is of a {manifest['denoiser']}, and pipeline/ holds a {kind}")
        if subject.component != manifest["component"]:
            raise _Unlike(f"the manifest's {manifest['component']} is not what is in pipeline/")
        if masks.keys() != manifest["plan"].keys():
            raise _Unlike("the masks are of other layers than the manifest's plan")
        for name, mask in masks.items():
            if abs(1 - float(mask.sum()) / max(mask.numel(), 1) - manifest["sparsity_per_layer"][name]) > 1e-9:
                raise _Unlike(f"the mask of {name} keeps another share than the manifest says")
        _check_depth(denoiser, manifest.get("depth"))
        cuts = of_units(parse_request(manifest["pattern"])) is not None
        if cuts and manifest["shrunk"] is None:
            raise _Unlike("the pattern is structured, but the manifest describes no shrunk layers")
        if manifest["shrunk"] is not None and not cuts:
            raise _Unlike("the manifest describes shrunk layers, but the pattern is not structured")
        weights = weight_masks(masks, manifest["shrunk"] is not None)
        _check_zeros(denoiser, weights)
        if manifest["shrunk"] is not None:
            _check_shapes(denoiser, {name: m for name, m in masks.items() if not name.endswith(WEIGHT)}, manifest)
    except _Unlike as error:
        raise UserError(f"{folder}: {error}; its files were changed after pruning, or do not belong together") from None
    if _dtype(denoiser) == manifest["dtype"] and model_hash(denoiser) != manifest["denoiser_sha256"]:
        raise UserError(f"{folder}: the weights are not those of the manifest; they were changed after pruning")


class _Unlike(Exception):
    """What does not agree in a run's files."""


def _check_depth(denoiser: Any, depth: Mapping[str, Any] | None) -> None:
    """The model's own config counts the stages that the manifest says are left."""
    models = parts_of(denoiser)
    for prefix, changed in () if depth is None else depth["config"].items():
        config: Any = models[prefix].config if prefix in models else {}
        if other := [key for key, value in changed.items() if _plain(config.get(key)) != value]:
            raise _Unlike(f"its {other[0]} is not the {changed[other[0]]} that the manifest says is left")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_zeros(denoiser: Any, masks: Mapping[str, Tensor]) -> None:
    """Every layer whose single weights went is there, has its mask's shape, and is zero where its mask says so."""
    there = dict(denoiser.named_parameters())
    if missing := [name for name in masks if f"{name}.weight" not in there]:
        raise _Unlike(f"the denoiser has no layer {missing[0]}")
    if broken := broken_masks(denoiser, masks):
        raise _Unlike(f"{len(broken)} layers, such as {broken[0]}, are not zero where their masks say so")


def _check_shapes(denoiser: Any, masks: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """What the manifest says of shrunk layers is what the model's own config says, and covers the plan."""
    own: dict[str, dict[str, Any]] = {}
    for prefix, model in parts_of(denoiser).items():
        for key, described in (shrunk_of(model) or {}).items():
            own.setdefault(key, {}).update({prefix + name: value for name, value in described.items()})
    for key, described in manifest["shrunk"].items():
        if other := [name for name, value in described.items() if own.get(key, {}).get(name) != value]:
            raise _Unlike(f"{other[0]} is not shrunk as the manifest says")
    known = {name.removesuffix(".weight") for name in manifest["shrunk"].get("tensors", {})}
    known |= manifest["shrunk"].get("layers", {}).keys()
    groups = graph_of(denoiser).group_of
    for name, mask in masks.items():
        layers = groups[name].layers if name in groups else (name,)
        if int(mask.sum()) != (groups[name].count if name in groups else _rank(denoiser, name, len(mask))):
            raise _Unlike(f"{name} does not have the heads, neurons or directions that its mask keeps")
        if name in groups and (uncovered := set(layers) - known):
            raise _Unlike(f"the manifest does not describe the shrunk layer {min(uncovered)}")


def _rank(denoiser: Any, layer: str, width: int) -> int | None:
    """Directions that a layer reads; None if there is no such layer."""
    found = dict(denoiser.named_modules()).get(layer)
    if found is None or not hasattr(found, "weight"):
        return None
    return int(found.weight.shape[1]) if hasattr(found, "basis") else width


def _dtype(denoiser: Any) -> str:
    return str(dtype_of(denoiser)).removeprefix("torch.")
