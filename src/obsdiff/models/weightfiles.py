"""Which weight files a pipeline's folder holds, and a denoiser out of a single one."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from obsdiff.errors import UserError

_WEIGHTS = (".safetensors", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_DENOISERS = ("transformer", "unet")


def variant_in(folder: Path, asked: str | None = None) -> str | None:
    """The variant to load ("fp16" of ``model.fp16.safetensors``): the one that is asked for, else the only one that a
    component has where it lacks the plain files.

    Args:
        folder: A pipeline's folder; of a hub id that is none, ``asked`` is taken as it is.
        asked: What the user named.

    Raises:
        UserError: There are several to choose from, or none that is called so.
    """
    if not folder.is_dir():
        return asked
    there: dict[str, set[str | None]] = {}
    for file in sorted(folder.glob("*/*")):
        if file.suffix in _WEIGHTS:
            middle = _SHARD.sub("", file.stem).partition(".")[2]
            there.setdefault(file.parent.name, set()).add(middle or None)
    named = sorted({variant for variants in there.values() for variant in variants if variant is not None})
    if asked is not None and asked not in named:
        listed = f"it has {', '.join(named)} and the plain ones" if named else "it has the plain ones alone"
        raise UserError(f"{folder} has no weight files of the variant {asked!r}; {listed}")
    if asked is not None:
        return asked
    needed = [variants for variants in there.values() if None not in variants]
    common = set.intersection(*needed) if needed else set()
    if needed and len(common) != 1:
        raise UserError(f"the weight files in {folder} are variants alone, {', '.join(named)}; choose one (--variant)")
    return next(iter(common), None)


def denoiser_in(index: dict[str, Any], source: str) -> tuple[str, str]:
    """Name and class of the one denoiser in a pipeline's ``model_index.json``.

    Raises:
        UserError: It has none, two, or a pruned one.
    """
    found = [name for name in (*_DENOISERS, "transformer_2") if (index.get(name) or [None])[0] is not None]
    if len(found) != 1:
        raise UserError(f"{source} has {len(found)} denoisers, so a file cannot stand in place of one")
    library, kind = index[found[0]]
    if library != "diffusers":
        raise UserError(f"the {found[0]} of {source} is a {kind} of {library}; a file replaces dense ones alone")
    return found[0], kind


def read_denoiser(file: Path, source: str, component: str, kind: str, dtype: Any) -> Any:
    """A denoiser of class ``kind`` with the weights of one ``.safetensors`` file.

    Args:
        file: Its tensors are named as diffusers names them, or as the model's authors do where diffusers can convert
            them; a checkpoint of a whole pipeline is one of these.
        source: Folder or hub id of the pipeline whose config the denoiser has.
        component: Its name there.
        kind: Its class in diffusers.
        dtype: A ``torch.dtype``.

    Raises:
        UserError: The file holds something else.
    """
    import diffusers
    from accelerate import init_empty_weights
    from safetensors import SafetensorError, safe_open

    model_class = getattr(diffusers, kind)
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no readable .safetensors file ({error}); give one file of a denoiser") from error
    if any("lora_" in name for name in names):
        raise UserError(f"{file} is a LoRA; load and fuse it (pipe.load_lora_weights, pipe.fuse_lora) before pruning")
    config = model_class.load_config(source, subfolder=component)
    with init_empty_weights():
        model = model_class.from_config(config)
    wanted = model.state_dict().keys()
    try:
        if names == wanted:
            with TemporaryDirectory() as folder:  # as saved by diffusers, which knows what stays in float32
                model.save_config(folder)
                (Path(folder) / "diffusion_pytorch_model.safetensors").symlink_to(file.resolve())
                return model_class.from_pretrained(folder, dtype=dtype)
        if not hasattr(model_class, "from_single_file"):
            raise UserError(_unlike(file, kind, names, set(wanted)))
        converted = model_class.from_single_file(str(file), config=source, subfolder=component, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # the converters of diffusers raise whatever a missing key leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{_unlike(file, kind, names, set(wanted))} ({type(error).__name__}: {reason})") from error
    if absent := [name for name, parameter in converted.named_parameters() if parameter.is_meta]:
        raise UserError(f"{_unlike(file, kind, names, set(wanted))}; it lacks {absent[0]}")
    return converted.eval()


def _unlike(file: Path, kind: str, names: set[str], wanted: set[str]) -> str:
    """What a file's names have to do with those of the model."""
    odd = sorted(names - wanted) or sorted(wanted - names) or sorted(names)
    return (
        f"{file} does not hold the weights of this {kind}: {len(names & wanted)} of its {len(names)} tensors are "
        f"called like the model's {len(wanted)}; odd is such as {odd[0] if odd else 'nothing'}"
    )
