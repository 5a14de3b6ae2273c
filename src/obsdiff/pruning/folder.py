"""Pruned pipelines on disk: safetensors, a manifest, bit-packed masks; never a pickle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from obsdiff.errors import UserError
from obsdiff.files import read_json, whole_folder, write_json
from obsdiff.models import obsdiff_shrunk
from obsdiff.models.info import INFO_FILE, info_of
from obsdiff.models.loading import open_pipeline, to_device
from obsdiff.models.register import LIBRARY
from obsdiff.models.wiring import denoiser_of, shrunk_of, wire
from obsdiff.paths import user_path
from obsdiff.pruning import planfile
from obsdiff.pruning.manifest import FILE, manifest_of, read_manifest
from obsdiff.pruning.masks import broken_masks, load_masks, save_masks
from obsdiff.pruning.oneshot import PruneReport
from obsdiff.pruning.planfile import write_plan
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
    with whole_folder(Path(output), replace=overwrite) as folder:
        write_pipeline(pipe, folder, report)


def check_output(output: Path, overwrite: bool, flag: str = "--overwrite true") -> None:
    """Refuse a folder that holds anything but an earlier run that may be replaced.

    Raises:
        UserError: It does.
    """
    if output.is_file() or output.is_symlink():
        raise UserError(f"{output} exists and is not a folder; choose another output")
    if output.is_dir() and any(output.iterdir()):
        if not (output / FILE).is_file():
            raise UserError(f"{output} exists and holds something else than a prune run; choose another output")
        if not overwrite:
            raise UserError(f"{output} holds an earlier prune run; choose another output or pass {flag}")


def write_pipeline(pipe: Any, folder: Path, report: PruneReport) -> None:
    """The files of :func:`save_pipeline`, into a folder that is there."""
    wiring = wire(denoiser_of(pipe))
    write_pipeline_files(pipe, folder)
    save_masks(report.masks, folder / MASKS)
    manifest = manifest_of(report, info_of(pipe).source, wiring.family.component, wiring.family.denoiser)
    manifest |= {"denoiser_sha256": model_hash(wiring.denoiser), "dtype": _dtype(wiring.denoiser)}
    write_json(folder / FILE, manifest)
    write_plan(report.plan, folder / planfile.FILE, wiring.family.denoiser, report.model)


def write_pipeline_files(pipe: Any, folder: Path) -> None:
    """``pipeline/``: what diffusers loads, with obsdiff's information, and the code of a shrunk denoiser."""
    wiring = wire(denoiser_of(pipe))
    target = folder / PIPELINE
    pipe.save_pretrained(target, safe_serialization=True)
    write_json(target / INFO_FILE, info_of(pipe).to_json())
    component = wiring.family.component
    if shrunk_of(wiring.denoiser) is not None:
        shutil.copyfile(str(obsdiff_shrunk.__file__), target / component / f"{LIBRARY}.py")
        index = read_json(target / "model_index.json", "a pipeline's index")
        index[component] = [LIBRARY, type(wiring.denoiser).__name__]
        write_json(target / "model_index.json", index)


def load_pipeline(source: Any, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """Load a pipeline: an embedded one by name ("digits-sd3"), a prune run's folder, any diffusers folder, a hub id.

    Pruned pipelines come back exactly as they were saved, shrunk shapes included, and are checked against their
    manifest and masks.

    Args:
        source: The name or folder; a pipeline object is moved to ``device`` and returned.
        dtype: "float32", "bfloat16" or "float16"; None: what a prune run was saved in, else "float32".
        device: Such as "cpu" or "cuda".

    Raises:
        UserError: Nothing loadable is called so, or the files do not belong together.
    """
    if not isinstance(source, str | Path):
        return to_device(source, device)
    folder = run_folder(source)
    if folder is None:
        return open_pipeline(source, dtype or "float32", device)
    manifest = read_manifest(folder)
    pipe = open_pipeline(folder / PIPELINE, dtype or manifest["dtype"], device, manifest, name=str(source))
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
    denoiser: Any = denoiser_of(pipe)
    shrunk = manifest["shrunk"]
    if shrunk is not None:
        for name, shape in shrunk["layers"].items():
            if list(denoiser.get_submodule(name).weight.shape) != shape:
                raise UserError(f"{folder}: layer {name} does not have the shape {shape} of the manifest")
    elif broken := broken_masks(denoiser, load_masks(folder / MASKS)):
        raise UserError(f"{folder}: {len(broken)} layers, such as {broken[0]}, are not zero where their masks say so")
    if _dtype(denoiser) == manifest["dtype"] and model_hash(denoiser) != manifest["denoiser_sha256"]:
        raise UserError(f"{folder}: the weights are not those of the manifest; they were changed after pruning")


def _dtype(denoiser: Any) -> str:
    return str(denoiser.dtype).removeprefix("torch.")
