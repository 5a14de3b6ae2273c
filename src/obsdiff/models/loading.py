"""Opening pipelines: embedded by name, from a folder, from the hub, or passed through."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from obsdiff.devices import check_device_name, choose_device
from obsdiff.errors import UserError
from obsdiff.files import read_json
from obsdiff.models.info import INFO_FILE, PipelineInfo, attach_info, read_info
from obsdiff.models.register import register
from obsdiff.models.weightfiles import denoiser_in, read_denoiser, variant_in
from obsdiff.names import DTYPES, EMBEDDED
from obsdiff.paths import user_path


@dataclass(frozen=True)
class Weights:
    """Which of a pipeline's weight files are loaded.

    Attributes:
        variant: Such as "fp16", for files called ``….fp16.safetensors``; None: the plain ones, or of a folder that has
            none of these the only variant.
        denoiser: A ``.safetensors`` file in place of the pipeline's own denoiser.
        parts: Components that are not loaded, by name: what stands in their place.
    """

    variant: str | None = None
    denoiser: str | Path | None = None
    parts: Mapping[str, Any] | None = None


def open_pipeline(
    source: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    manifest: Mapping[str, Any] | None = None,
    name: str | None = None,
    weights: Weights = Weights(),
) -> Any:
    """Load what diffusers loads, with obsdiff's information attached.

    Args:
        source: An embedded name, a folder with ``model_index.json``, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        device: Where it goes.
        manifest: ``pruning.json`` that belongs to it.
        name: What to call it in reports; the source by default.
        weights: Which files.

    Raises:
        UserError: Nothing loadable is called so.
    """
    check_loading(dtype, device)
    folder = find_pipeline(source)
    variant, denoiser = variant_in(Path(folder), weights.variant), check_denoiser_file(weights.denoiser)
    choose_device(device)
    info = read_info(Path(folder))

    import torch
    from diffusers import DiffusionPipeline

    register()
    given: dict[str, Any] = {**absent(folder)}
    try:
        if variant is not None:
            given["variant"] = variant
        own = dict(weights.parts or {})
        if denoiser is not None:
            component, kind = denoiser_in(dict(DiffusionPipeline.load_config(folder)), str(source))
            own[component] = read_denoiser(denoiser, folder, component, kind, getattr(torch, dtype))
        with _missing_weights() as missing:
            pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **given, **own)
        pipe.register_modules(**own)  # where the class calls its denoiser optional (Wan), diffusers loads another
    except UserError:
        raise
    except Exception as error:  # diffusers, hub client and safetensors raise a dozen kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load pipeline {source}: {type(error).__name__}: {reason}") from error
    accepted = inspect.signature(type(pipe).__call__).parameters
    if foreign := [name for name in info.get("call", {}) if name not in accepted]:
        raise UserError(f"{Path(folder) / INFO_FILE}: {type(pipe).__name__} takes no {foreign[0]}; delete it there")
    missing += [
        f"{component}: {name}"
        for component, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, parameter in module.named_parameters()
        if parameter.is_meta
    ]
    if missing:
        raise UserError(
            f"cannot load pipeline {source}: its files lack {len(missing)} weights, such as {missing[0]}; copy or "
            "download it again"
        )
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and component not in (weights.parts or {}):
            _own_buffers(module)
    called = name or str(source) + ("" if denoiser is None else f" with {denoiser}")
    if depth := (manifest or {}).get("depth"):  # as runs said it before obsdiff.json did
        info.setdefault("blocks", depth["kept"])
    attach_info(pipe, PipelineInfo(called, **info, manifest=manifest))
    pipe.set_progress_bar_config(disable=True)
    return to_device(pipe, device)


def _own_buffers(model: Any) -> None:
    """Copy what else a model keeps of its files: one view of a file keeps all of it mapped, when its weights are
    changed or gone."""
    found = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    copies = {buffer: buffer.clone() for _, _, buffer in found}  # one of each: some have two names
    for module, name, buffer in found:
        setattr(module, name, copies[buffer])


def split_source(source: str) -> tuple[str, str | None]:
    """``PIPELINE with FILE.safetensors``, as reports call a pipeline with another denoiser: its two parts."""
    name, _, file = source.rpartition(" with ")
    return (name, file) if name and file.endswith(".safetensors") else (source, None)


def check_denoiser_file(file: str | Path | None) -> Path | None:
    """The file, ``~`` filled in.

    Raises:
        UserError: It is missing, or no ``.safetensors`` file.
    """
    if file is None:
        return None
    path = user_path(str(file), "denoiser")
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(f"--denoiser {path} is no .safetensors file; give one file with a denoiser's weights")
    return path


def absent(folder: str | Path) -> dict[str, None]:
    """Components that a saved pipeline went without (text encoders, say), which diffusers wants to be told of."""
    path = Path(folder) / "model_index.json"
    index = read_json(path, "a pipeline's index") if path.is_file() else {}
    return {name: None for name, value in index.items() if value == [None, None]}


def check_loading(dtype: str | None, device: str | None) -> None:
    """Refuse names of dtypes and devices that are none, without importing torch.

    Raises:
        UserError: Naming the ones there are.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    check_device_name(device)


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collects the weights that transformers found in no file and filled with noise: it only logs them."""
    missing: list[str] = []

    class Reports(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
            model = text.split(" ", 1)[0]
            missing.extend(f"{model}: {name}" for name in re.findall(r"^(\S+)\s*\|\s*MISSING", text, re.MULTILINE))

    logger, handler = logging.getLogger("transformers.modeling_utils"), Reports()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield missing
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def to_device(pipe: Any, device: str) -> Any:
    """Move a pipeline, with a clear error for devices that are not there.

    Raises:
        UserError: The device is not there, or ``pipe`` is no pipeline.
    """
    if not hasattr(pipe, "components") or not hasattr(pipe, "to"):
        raise UserError(f"a {type(pipe).__name__} is no pipeline; give a name, a folder, a hub id or a pipeline object")
    choose_device(device)
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot move the pipeline to device {device!r}: {reason}") from error


def check_source(source: str, option: str = "pipeline") -> str:
    """The name of a pipeline (:func:`split_source`), ``~`` filled in; refuses what is neither there nor a hub id,
    without importing torch.

    Raises:
        UserError: Nothing can be called so.
    """
    whole, (source, denoiser) = source, split_source(source)
    if denoiser is not None:
        check_denoiser_file(denoiser)
        return whole.replace(source, check_source(source, option), 1)
    path = user_path(source, option)
    if source not in EMBEDDED and not any((folder / "pruning.json").is_file() for folder in (path, path.parent)):
        find_pipeline(str(path) if source.startswith("~") else source)
    return str(path) if source.startswith("~") else source


def _check_components(folder: Path) -> None:
    """Every component that the index names has its folder: diffusers makes up a tokenizer that has none."""
    index = read_json(folder / "model_index.json", "a pipeline's index")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str | list):
        raise UserError(f"{folder / 'model_index.json'} is not a pipeline's index")
    for name, value in index.items():
        named = isinstance(value, list) and len(value) == 2 and value[1] is not None
        if named and not name.startswith("_") and not (folder / name).is_dir():
            raise UserError(f"{folder} lacks its {name}, which model_index.json names; copy or download it again")


def find_pipeline(source: str | Path) -> str:
    """The folder or hub id to load.

    Raises:
        UserError: ``source`` is neither, or the folder holds no pipeline.
    """
    source = str(source)
    if source in EMBEDDED:
        folder = files("obsdiff.data.assets").joinpath(source)
        return str(folder)
    path = user_path(source, "pipeline")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{source} is a folder without model_index.json; give a diffusers pipeline folder")
        _check_components(path)
        return str(path)
    looks_like_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not path.exists()
    if not looks_like_hub_id:
        raise UserError(
            f"unknown pipeline {source!r}; give an embedded name ({', '.join(EMBEDDED)}), a folder, or a hub id "
            "(owner/name)"
        )
    return source
