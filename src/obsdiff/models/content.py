"""What a pipeline consists of, as hashes: results that are kept belong to content, never to a path or a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from obsdiff.spill import in_turn

TEXT = ("text_encoder*", "tokenizer*")  # turn prompts into embeds, and nothing else
DECODING = ("vae", "safety_checker", "feature_extractor", "image_encoder")  # latents do not depend on them
RELEASED = "obsdiff_released"  # on a model that is out of memory (:mod:`obsdiff.models.released`): its hash
# config entries that say how a model was loaded or saved, not what it computes
_INCIDENTAL = ("_*", "transformers_version", "architectures", "dtype", "torch_dtype")

_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def component_hashes(pipe: Any, without: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 by name of everything that stands upstream of an image.

    Each component (weights *and* config of models, serialised content of tokenizers, class and config of the
    scheduler), and as "pipeline" the pipeline's own class and settings. A component that is None has no entry.

    Args:
        pipe: A diffusers pipeline.
        without: Shell patterns of components to leave out, such as :data:`TEXT` where prompts are encoded already.
    """
    found = {"pipeline": _digest(type(pipe).__name__, _own_settings(pipe))}
    for name, component in sorted(pipe.components.items()):
        if component is not None and not any(fnmatchcase(name, pattern) for pattern in without):
            found[name] = component_hash(component)
    return found


def component_hash(component: Any) -> str:
    """SHA-256 of one component: what it computes, whatever it is called and wherever it came from."""
    kind = type(component).__name__
    if isinstance(component, nn.Module):
        if (kept := vars(component).get(RELEASED)) is not None:
            return str(kept)
        return _digest(kind, _settings(component), _adapters(component), model_hash(component))
    if hasattr(component, "get_vocab"):
        return _digest(kind, _tokenizer(component))
    return _digest(kind, _settings(component))


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of a module's parameters and buffers.

    The hash of unchanged tensors is remembered: the same memory at the same version with the same sum of bits.
    """
    state = model.state_dict(keep_vars=True)
    seal = tuple(_seal(name, tensor) for name, tensor in zip(state, in_turn(state.values()), strict=True))
    if (known := _known.get(model)) is not None and known[0] == seal:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in zip(state, in_turn(state.values()), strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    _known[model] = seal, digest.hexdigest()
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values, in the order of its indices."""
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _seal(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Changes whenever the tensor does; twenty times as fast as hashing it."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = values[: len(values) // 8 * 8]
    if whole.storage_offset() % 8:
        whole = whole.clone()
    total = int(whole.view(torch.int64).sum()), int(values[len(whole) :].sum())
    return name, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version, total


def _own_settings(pipe: Any) -> dict[str, Any]:
    """What a pipeline decides beside its components."""
    own = {key: value for key, value in dict(pipe.config).items() if not isinstance(value, tuple | list)}
    return {**_kept(own), "vae_scale_factor": getattr(pipe, "vae_scale_factor", None)}


def _settings(component: Any) -> dict[str, Any]:
    """A component's config, as far as it changes what it computes."""
    config = getattr(component, "config", None)
    if config is None and hasattr(component, "to_dict"):
        config = component
    if config is None:
        return {}
    return _kept(dict(config.to_dict() if hasattr(config, "to_dict") else config))


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): value
        for key, value in config.items()
        if not any(fnmatchcase(str(key), pattern) for pattern in _INCIDENTAL)
    }


def _adapters(model: nn.Module) -> list[Any]:
    """State of adapters that is not in any tensor: which are active, and how strongly."""
    return [
        (name, module.active_adapters, module.scaling, module.disable_adapters)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "scaling") and hasattr(module, "active_adapters")
    ]


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's content: vocabulary, rules and what it pads and cuts to."""
    content = {
        "length": tokenizer.model_max_length,
        "special": tokenizer.special_tokens_map,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "template": getattr(tokenizer, "chat_template", None),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {**content, "vocabulary": tokenizer.get_vocab()}
    rules = json.loads(backend.to_str())
    # what the last call set, not what the tokenizer is
    return {**content, "rules": {key: value for key, value in rules.items() if key not in ("truncation", "padding")}}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
