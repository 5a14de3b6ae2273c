"""Changing a denoiser in place, so that every change can be taken back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError, brief
from obsdiff.models.denoisers import parts_of, shrunk_of
from obsdiff.models.graph import Graph, Group, own_name, shapes_with
from obsdiff.models.obsdiff_shrunk import projecting_class, selecting_class, shrunk_class, sizes_of
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.obs.select import count_nonzero
from obsdiff.spill import Shelf, Spill, Spilled, in_turn

_ABSENT = object()


class Edits:
    """Attribute assignments with the values that were there before the first of each.

    Args:
        spill: Where old parameters are put away; None: they stay in memory.
        on_host: Whether that has to be the host's.
        shelf: The file that parameters rest in, and those set in their places will, too; None: they are in memory.
    """

    def __init__(self, spill: Spill | None = None, on_host: bool = False, shelf: Shelf | None = None) -> None:
        self._old: dict[tuple[int, str], tuple[Any, Any]] = {}  # by attribute its owner and value
        self._spill, self._on_host, self._shelf = spill, on_host, shelf

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, remembered."""
        if self._shelf is not None and isinstance(value, nn.Parameter):
            value.data = self._shelf.mapped(value)
            self._shelf.drop()  # the old one has been read
        if (id(owner), name) not in self._old:
            old = getattr(owner, name)
            if self._spill is not None and isinstance(old, nn.Parameter):
                old = self._spill.put(old)
            elif self._on_host and isinstance(old, nn.Parameter):
                old = nn.Parameter(old.detach().cpu(), old.requires_grad)
            self._old[id(owner), name] = owner, old
        setattr(owner, name, value)

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Like :meth:`set`, for an attribute that is not there yet."""
        self._old.setdefault((id(owner), name), (owner, _ABSENT))
        setattr(owner, name, value)

    def fit_sizes(self, layer: nn.Module) -> None:
        """Let a layer's attributes agree with the shape of its weight."""
        for name, value in sizes_of(layer).items():
            self.set(layer, name, value)

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
        """Take everything back, latest first.

        Raises:
            UserError: Parameters that were put away cannot be read, or memory does not hold them; all else is back.
        """
        lost: dict[str, str] = {}
        while self._old:
            (_, name), (owner, value) = self._old.popitem()
            if value is _ABSENT:
                delattr(owner, name)
                continue
            if isinstance(value, Spilled):
                assert self._spill is not None
                device = getattr(owner, name).device  # which offloading may have changed
                setattr(owner, name, None)  # what replaced it leaves first
                try:
                    value = self._spill.take(value, device)
                except (RuntimeError, OSError, ValueError) as error:  # no memory, or no such bytes
                    lost[name] = brief(str(error))
                    continue
            elif self._on_host and isinstance(value, nn.Parameter):
                value.data = value.data.to(getattr(owner, name).device)
            setattr(owner, name, value)
        if lost:
            raise UserError(
                f"{len(lost)} dense weights could not be put back ({lost.popitem()[1]}); load the model again"
            )


@contextmanager
def undone_on_error(folder: Path | None = None, on_host: bool = False, shelf: Shelf | None = None) -> Iterator[Edits]:
    """Edits that are taken back if the block fails or is interrupted: no weight changes by halves.

    Args:
        folder: On whose disk replaced parameters wait, so that memory need not hold them; None: in memory.
        on_host: Whether that has to be the host's, whatever device they were on.
        shelf: The file that parameters rest in, and new ones will, too: what is replaced needs no other.
    """
    with nullcontext() if folder is None or shelf is not None else closing(Spill(folder)) as spill:
        edits = Edits(spill, on_host, shelf)
        try:
            yield edits
        except BaseException as error:
            if spill is not None:
                clear_frames(error.__traceback__)  # what the failed work held leaves, so that there is room
            edits.undo()
            raise


def cut(
    edits: Edits,
    graph: Graph,
    kept: Mapping[str, Tensor],
    consumers: Mapping[str, tuple[Tensor, Tensor | None]],
) -> None:
    """Cut units out of all tensors that they touch.

    Args:
        edits: Remembers what was.
        graph: Of the denoiser as it is.
        kept: Bool (count,) by group, True = stays; groups that share an axis of a layer come together.
        consumers: By layer, the weight computed for the kept columns and what the bias takes up.
    """
    for name, chosen in kept.items():
        group = graph.group_of[name]
        for s in group.selected:
            _select(edits, graph.layer(s.layer), chosen.nonzero().flatten().tolist(), s.size)
        for attribute in group.attributes:
            edits.set(graph.layer(attribute.module), attribute.name, attribute.per_unit * int(chosen.sum()))
    for layer, gone in lost_rows(graph, kept).items():
        module = graph.layer(layer)
        stays = torch.ones(len(graph.weight(layer)), dtype=torch.bool, device=graph.weight(layer).device)
        stays[gone.to(stays.device)] = False
        bias = module.bias
        edits.set_weight(module, graph.weight(layer).detach()[stays], None if bias is None else bias.detach()[stays])  # type: ignore[operator]  # a tensor
        edits.fit_sizes(module)
    for layer, (weight, bias_shift) in consumers.items():
        edits.set_weight(graph.layer(layer), weight)
        edits.shift_bias(graph.layer(layer), bias_shift)
        edits.fit_sizes(graph.layer(layer))


def lost_rows(graph: Graph, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By layer or norm, the entries of its outputs (int64) that go where groups keep the units in ``kept``."""
    rows: dict[str, list[Tensor]] = {}
    for name, chosen in kept.items():
        group = graph.group_of[name]
        for s in (*group.producers, *group.followers):
            rows.setdefault(s.layer, []).append(s.entries(~chosen))
    return {layer: torch.cat(gone) for layer, gone in rows.items()}


def project(edits: Edits, graph: Graph, group: Group, basis: Tensor) -> None:
    """Let the layers of a group read what ``basis`` (rank, inputs) makes of their input, by one linear module."""
    assert group.basis is not None
    owner, _, child = group.basis.rpartition(".")
    model_name, _, container = owner.rpartition(".")
    model = graph.layer(model_name)
    if not hasattr(model, container):
        edits.add(model, container, nn.Module())
    like = graph.weight(group.layers[0])
    module = nn.Linear(basis.shape[1], len(basis), bias=False, device=like.device, dtype=like.dtype)
    module.weight.data.copy_(basis)
    module.requires_grad_(like.requires_grad)
    edits.add(getattr(model, container), child, module)
    for layer in map(graph.layer, group.layers):
        kind: Any = type(layer)
        edits.set(layer, "__class__", projecting_class(kind))
        edits.add(layer, "basis", own_name(group.basis))
        edits.add(layer, "projection", [module])


def _select(edits: Edits, norm: nn.Module, units: list[int], size: int) -> None:
    """Let a norm over all heads give only the kept ones; of one that does already, some of those."""
    before: Any = getattr(norm, "selected", None)
    if before is None:
        kind: Any = type(norm)
        edits.set(norm, "__class__", selecting_class(kind))
        edits.add(norm, "selected", [units, size])
    else:
        edits.set(norm, "selected", [[before[0][unit] for unit in units], size])


def shrunk_config(graph: Graph, names: Collection[str]) -> dict[str, Any]:
    """The ``shrunk`` entry of a model's config, for the tensors and attributes that the groups ``names`` touch, as they
    are now."""
    bases = {name: graph.group_of[name].layers[0] for name in names if graph.group_of[name].basis is not None}
    whole = {name for name, layer in bases.items() if not hasattr(graph.layer(layer), "basis")}
    planned = shapes_with(graph, {name: 1 for name in names if name not in whole})
    return {
        "tensors": {name: list(graph.denoiser.get_parameter(name).shape) for name in planned["tensors"]},
        "attributes": {
            module: {name: getattr(graph.layer(module), name) for name in attributes}
            for module, attributes in planned["attributes"].items()
        },
    }


def become_shrunk(edits: Edits, denoiser: nn.Module, shapes: Mapping[str, Any]) -> None:
    """Make the denoiser (or each of two) an instance of its class's shrunk subclass, so that its config describes its
    shapes."""
    from diffusers.configuration_utils import FrozenDict

    for prefix, model in parts_of(denoiser).items():
        own = {
            key: {name.removeprefix(prefix): value for name, value in described.items() if name.startswith(prefix)}
            for key, described in shapes.items()
        }
        before = shrunk_of(model)
        if before is None:
            kind: Any = type(model)
            edits.set(model, "__class__", shrunk_class(kind))
        else:  # pruned again: what was cut earlier stays described
            own = {key: {**before.get(key, {}), **own.get(key, {})} for key in before.keys() | own.keys()}
        config = FrozenDict({**model.config, "shrunk": own})  # type: ignore[dict-item]
        edits.set(model, "_internal_dict", config)


def zero_share(*weights: Tensor) -> float:
    """Share of the entries of all weights together that are exactly zero."""
    return 1 - sum(map(count_nonzero, in_turn(weights))) / sum(w.numel() for w in weights)


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
