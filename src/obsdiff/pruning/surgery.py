"""Changing a denoiser in place, so that every change can be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.wiring import WiredGroups, Wiring, shrunk_of
from obsdiff.obs.pattern import Pattern, Structured


class Edits:
    """Attribute assignments with their old values."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, remembered."""
        self._old.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def shift_bias(self, layer: nn.Module, shift: Tensor | None) -> None:
        """Add ``shift`` (rows,) to a layer's bias, computed in float32; None adds nothing."""
        if shift is not None:
            bias = layer.bias
            assert isinstance(bias, Tensor)
            shifted = (bias.detach().float() + shift.to(bias.device)).to(bias.dtype)
            self.set(layer, "bias", nn.Parameter(shifted, requires_grad=bias.requires_grad))

    def set_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace a layer's weight (and bias), in the dtype and on the device of the old ones."""
        for name, value in (("weight", weight), ("bias", bias)):
            old = getattr(layer, name)
            if value is not None and old is not None:
                new = value.to(dtype=old.dtype, device=old.device).contiguous()
                self.set(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))

    def undo(self) -> None:
        """Take everything back, latest first."""
        while self._old:
            owner, name, value = self._old.pop()
            setattr(owner, name, value)


@contextmanager
def undone_on_error() -> Iterator[Edits]:
    """Edits that are taken back if the block fails or is interrupted: no weight changes by halves."""
    edits = Edits()
    try:
        yield edits
    except BaseException:
        edits.undo()
        raise


def shrink_groups(
    edits: Edits,
    wiring: Wiring,
    groups: WiredGroups,
    kept: Tensor,
    consumers: Mapping[str, tuple[Tensor, Tensor | None]],
) -> None:
    """Cut the groups that are not ``kept`` (bool (count,)) out of all layers they touch.

    Producers lose the rows (and bias entries) of each slab, ``consumers`` get the weights computed for the kept
    columns and what their biases take up, the attention module its new head count and everything derived from it.
    """
    channels = kept.repeat_interleave(groups.size)
    rows = channels.repeat(groups.slabs)
    for name in groups.producers:
        layer = wiring.layer(name)
        assert isinstance(layer, nn.Linear)
        edits.set_weight(layer, layer.weight.detach()[rows], None if layer.bias is None else layer.bias.detach()[rows])
        edits.set(layer, "out_features", int(rows.sum()))
    for name in groups.consumers:
        layer = wiring.layer(name)
        weight, bias_shift = consumers[name]
        edits.set_weight(layer, weight)
        edits.shift_bias(layer, bias_shift)
        edits.set(layer, "in_features", int(channels.sum()))
    if groups.kind == "heads":
        for attribute, value in head_attributes(int(kept.sum()), groups.size).items():
            edits.set(wiring.layer(groups.name), attribute, value)


def head_attributes(heads: int, head_dim: int) -> dict[str, int]:
    """What an attention module of diffusers derives from its number of heads."""
    return {
        "heads": heads,
        "sliceable_head_dim": heads,
        "inner_dim": heads * head_dim,
        "inner_kv_dim": heads * head_dim,
    }


def shrunk_shapes(wiring: Wiring, names: set[str]) -> dict[str, Any]:
    """The ``shrunk`` entry of a model's config: sizes of every layer and attention that ``names`` (groups) touch."""
    layers: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for groups in wiring.groups:
        if groups.name in names:
            for layer in (*groups.producers, *groups.consumers):
                layers[layer] = list(wiring.weight(layer).shape)
            if groups.kind == "heads":
                attention = wiring.layer(groups.name)
                attributes[groups.name] = {key: int(getattr(attention, key)) for key in head_attributes(1, 1)}
    return {"layers": layers, "attributes": attributes}


def become_shrunk(edits: Edits, denoiser: nn.Module, shapes: Mapping[str, Any]) -> None:
    """Make the denoiser an instance of its class's shrunk subclass, so that its config describes its shapes."""
    from diffusers.configuration_utils import FrozenDict

    from obsdiff.models.obsdiff_shrunk import shrunk_class

    before = shrunk_of(denoiser)
    if before is None:
        kind: Any = type(denoiser)
        edits.set(denoiser, "__class__", shrunk_class(kind))
    else:  # pruned again: what was cut earlier stays described
        shapes = {key: {**before[key], **shapes[key]} for key in ("layers", "attributes")}
    config = FrozenDict({**denoiser.config, "shrunk": dict(shapes)})  # type: ignore[dict-item]
    edits.set(denoiser, "_internal_dict", config)


def zero_share(*weights: Tensor) -> float:
    """Share of the entries of all weights together that are exactly zero."""
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


def measured_sparsity(denoiser: nn.Module, pruned: Mapping[str, Pattern], parameters: Mapping[str, int]) -> float:
    """What pruning came to, measured on the weights.

    Args:
        denoiser: As it is now.
        pruned: The plan's patterns by layer, or for structured ones by module.
        parameters: Of the whole denoiser, "dense" and "pruned".

    Returns:
        Share of the pruned layers' weights that is zero; structured: of the denoiser's parameters that is gone.
    """
    if any(isinstance(pattern, Structured) for pattern in pruned.values()):
        return 1 - parameters["pruned"] / parameters["dense"]
    return zero_share(*(denoiser.get_parameter(f"{name}.weight") for name in pruned))
