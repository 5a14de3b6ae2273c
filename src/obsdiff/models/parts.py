"""The building blocks that diffusers makes its denoisers of, as data: which slices of which tensors each unit owns.

One row serves every family that uses the block; facts and their proofs: docs/families.md. A row names everything a
block *may* have; what a particular module lacks (the text stream of SD3's last block) is left out when the row is
resolved on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.graph import COLUMNS, ROWS, Attribute, Group, Slices


@dataclass(frozen=True)
class Dimension:
    """A removable dimension of a part.

    Attributes:
        kind: "heads", "ffn" or "channels".
        count: Units of a module.
        size: Channels of a unit.
        suffix: Added to the module's name; two dimensions of one module differ in it.
        attributes: Attributes of the module (or, with a dotted path, of one inside it) that follow, with what each
            unit adds to them; set where they exist.
        sizes: Layers in which a unit has another number of channels.
    """

    kind: str
    count: Callable[[Any], int]
    size: Callable[[Any], int]
    suffix: str = ""
    attributes: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    sizes: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)


Layout = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Part:
    """A class (or several of one make).

    Attributes:
        classes: Names of the classes.
        dimensions: By the name that the layouts use.
        rows, columns: By layer: the dimensions along its outputs or inputs, in order.
        vectors: By norm: the dimensions along its weight.
        norms: Norms of queries and keys; where one runs over all heads it stays whole and its layer keeps its rows.
    """

    classes: tuple[str, ...]
    dimensions: Mapping[str, Dimension]
    rows: Layout
    columns: Layout
    vectors: Layout = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)


def _at(module: nn.Module, path: str) -> Any:
    """The module at a dotted path, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None) if not part.isdigit() else _item(found, int(part))
        if found is None:
            return None
    return found


def _item(found: Any, index: int) -> Any:
    return found[index] if found is not None and len(found) > index else None


def _rows(path: str) -> Callable[[Any], int]:
    return lambda module: int(_at(module, path).weight.shape[0])


def _columns(path: str) -> Callable[[Any], int]:
    return lambda module: int(_at(module, path).weight.shape[1])


def _one(_: Any) -> int:
    return 1


# --- attention --------------------------------------------------------------------------------------------------------
# The widths of queries, keys and values are read off the consumer, since a norm over all heads keeps q and k whole.


def _inner(attention: Any) -> int:
    """Channels of all heads together."""
    for path in ("to_out.0", "to_add_out"):
        if _there(attention, path):
            return int(_at(attention, path).weight.shape[1])
    return int(attention.to_q.weight.shape[0])  # an attention whose output layer is its block's


def _head_dim(attention: Any) -> int:
    return _divided(_inner(attention), int(attention.heads), "channels of all heads")


def _key_heads(attention: Any) -> int:
    """Heads of keys and values: units of grouped queries are one of these with all query heads that read it."""
    return int(attention.to_v.weight.shape[0]) // _head_dim(attention)


def _queries(attention: Any) -> int:
    """Query heads per unit."""
    return _divided(int(attention.heads), _key_heads(attention), "query heads over those of keys and values")


def _divided(number: int, parts: int, what: str) -> int:
    if parts < 1 or number % parts:
        raise _Uneven(f"{number} {what} do not make {parts} equal parts")
    return number // parts


class _Uneven(Exception):
    """An attention whose heads do not divide what they should."""


_HEADS = Dimension(
    "heads",
    count=_key_heads,
    size=lambda attention: _queries(attention) * _head_dim(attention),
    attributes={
        "heads": _queries,
        "sliceable_head_dim": _queries,
        "inner_dim": lambda attention: _queries(attention) * _head_dim(attention),
        "inner_kv_dim": _head_dim,
        "kv_inner_dim": _head_dim,
    },
    sizes=dict.fromkeys(("to_k", "to_v", "add_k_proj", "add_v_proj"), _head_dim),
)
_PRODUCERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_NORMS = {
    "norm_q": "to_q",
    "norm_k": "to_k",
    "norm_added_q": "add_q_proj",
    "norm_added_k": "add_k_proj",
}

ATTENTION = Part(
    ("Attention", "FluxAttention", "Flux2Attention", "WanAttention", "LTXAttention"),
    {"heads": _HEADS},
    rows=dict.fromkeys(_PRODUCERS, ("heads",)),
    columns={"to_out.0": ("heads",), "to_add_out": ("heads",)},
    norms=_NORMS,
)


# --- fused single blocks: attention and neurons beside each other, one output layer -----------------------------------


def _inside(path: str, dimension: Dimension) -> Dimension:
    """The dimension of a module inside the part."""

    def inner(function: Callable[[Any], int]) -> Callable[[Any], int]:
        return lambda module: function(_at(module, path))

    return Dimension(
        dimension.kind,
        inner(dimension.count),
        inner(dimension.size),
        f".{path}",
        {f"{path}.{name}": inner(function) for name, function in dimension.attributes.items()},
        {f"{path}.{name}": inner(function) for name, function in dimension.sizes.items()},
    )


SINGLE_BLOCK = Part(
    ("FluxSingleTransformerBlock", "ChromaSingleTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    {
        "heads": _inside("attn", _HEADS),
        "ffn": Dimension("ffn", _rows("proj_mlp"), _one, ".proj_mlp", {"mlp_hidden_dim": _one}),
    },
    rows={f"attn.{name}": ("heads",) for name in _PRODUCERS[:3]} | {"proj_mlp": ("ffn",)},
    columns={"proj_out": ("heads", "ffn")},
    norms={f"attn.{norm}": f"attn.{layer}" for norm, layer in _NORMS.items()},
)


def _fused_head_dim(attention: Any) -> int:
    return _divided(int(attention.inner_dim), int(attention.heads), "channels of all heads")


PARALLEL_ATTENTION = Part(
    ("Flux2ParallelSelfAttention",),
    {
        "heads": Dimension(
            "heads",
            lambda attention: int(attention.heads),
            _fused_head_dim,
            attributes={"heads": _one, "inner_dim": _fused_head_dim},
        ),
        "ffn": Dimension(
            "ffn", lambda attention: int(attention.mlp_hidden_dim), _one, ".mlp", {"mlp_hidden_dim": _one}
        ),
    },
    rows={"to_qkv_mlp_proj": ("heads", "heads", "heads", "ffn", "ffn")},
    columns={"to_out": ("heads", "ffn")},
)


# --- feed-forward -----------------------------------------------------------------------------------------------------


def _neurons(consumer: str) -> dict[str, Dimension]:
    return {"ffn": Dimension("ffn", _columns(consumer), _one)}


def _feed_forward(classes: tuple[str, ...], producers: Layout, consumer: str) -> Part:
    return Part(classes, _neurons(consumer), producers, {consumer: ("ffn",)})


FEED_FORWARDS = (
    _feed_forward(("FeedForward",), {"net.0.proj": ("ffn",)}, "net.2"),  # gated ones hold it twice
    _feed_forward(("FeedForward",), {"w1": ("ffn",), "w3": ("ffn",)}, "w2"),  # Z-Image's class of that name
    _feed_forward(("Flux2FeedForward",), {"linear_in": ("ffn", "ffn")}, "linear_out"),
    _feed_forward(("LuminaFeedForward",), {"linear_1": ("ffn",), "linear_3": ("ffn",)}, "linear_2"),
    _feed_forward(("AuraFlowFeedForward",), {"linear_1": ("ffn",), "linear_2": ("ffn",)}, "out_projection"),
    _feed_forward(("GLUMBConv",), {"conv_inverted": ("ffn", "ffn"), "conv_depth": ("ffn", "ffn")}, "conv_point"),
)


# --- ResNet blocks: inner channels by whole GroupNorm groups, the only exact way --------------------------------------


def _channels_per_group(block: Any) -> int:
    return int(block.norm2.num_channels) // int(block.norm2.num_groups)


RESNET = Part(
    ("ResnetBlock2D",),
    {
        "channels": Dimension(
            "channels",
            lambda block: int(block.norm2.num_groups),
            _channels_per_group,
            attributes={"norm2.num_groups": _one},
        )
    },
    rows={"conv1": ("channels",), "time_emb_proj": ("channels",)},  # with scale and shift twice
    columns={"conv2": ("channels",)},
    vectors={"norm2": ("channels",)},
)

PARTS: tuple[Part, ...] = (ATTENTION, SINGLE_BLOCK, PARALLEL_ATTENTION, *FEED_FORWARDS, RESNET)


def groups_of(module: nn.Module, name: str, stage: int) -> list[Group]:
    """The groups of a module called ``name``, by the rows of its class; none if no row knows it.

    Raises:
        UserError: Its heads do not divide its channels, or grouped queries their keys.
    """
    classes = {base.__name__ for base in type(module).__mro__}
    try:
        return [
            group
            for part in PARTS
            if classes & set(part.classes)
            for key in part.dimensions
            if (group := _resolve(part, key, module, name, stage)) is not None
        ]
    except _Uneven as error:
        raise UserError(
            f"the heads of {name} ({type(module).__name__}) are uneven: {error}; undo what was changed in it, or load "
            "the pipeline again"
        ) from None


def _resolve(part: Part, key: str, module: nn.Module, name: str, stage: int) -> Group | None:
    """One dimension of a part on a module; None if the module lacks it (another class of the same name, a layer of
    odd size)."""
    if not any(_there(module, layer) for layer, along in part.columns.items() if key in along):
        return None
    dimension = part.dimensions[key]
    count = dimension.count(module)
    whole = {layer for norm, layer in part.norms.items() if _over_all(module, norm, dimension)}
    try:
        producers = _slices(part, part.rows, key, module, name, ROWS, without=whole)
        consumers = _slices(part, part.columns, key, module, name, COLUMNS)
        followers = _slices(part, part.vectors, key, module, name, ROWS)
    except _Odd:
        return None
    selected = tuple(
        Slices(f"{name}.{norm}", (0,), dimension.sizes.get(layer, dimension.size)(module))
        for norm, layer in part.norms.items()
        if layer in whole
    )
    attributes = []
    for path, per_unit in dimension.attributes.items():
        owner, _, attribute = path.rpartition(".")
        if hasattr(_at(module, owner) if owner else module, attribute):
            attributes.append(Attribute(f"{name}.{owner}" if owner else name, attribute, per_unit(module)))
    return Group(
        name + dimension.suffix,
        dimension.kind,
        count,
        stage,
        producers,
        consumers,
        followers,
        selected,
        tuple(attributes),
    )


class _Odd(Exception):
    """A layer does not have the size that its row says."""


def _there(module: nn.Module, layer: str) -> bool:
    return isinstance(getattr(_at(module, layer), "weight", None), Tensor)  # one made anew at each call too


def _over_all(module: nn.Module, norm: str, dimension: Dimension) -> bool:
    """Whether a norm of queries or keys runs over all heads, so that each head's values depend on all of them."""
    weight = getattr(_at(module, norm), "weight", None)
    return weight is not None and dimension.kind == "heads" and len(weight) > _head_dim_of(module, norm)


def _head_dim_of(module: nn.Module, norm: str) -> int:
    return _head_dim(_at(module, norm.rpartition(".")[0]) if "." in norm else module)


def _slices(
    part: Part, layouts: Layout, key: str, module: nn.Module, name: str, axis: int, without: set[str] | None = None
) -> tuple[Slices, ...]:
    """Where a dimension lies along one axis of all layers that have it."""
    found = []
    for layer, along in layouts.items():
        if key not in along or _at(module, layer) is None or layer in (without or ()):
            continue
        if not _there(module, layer):  # something else in its place: named, so that it is refused and not left uncut
            found.append(Slices(f"{name}.{layer}", (0,), 1))
            continue
        length = _at(module, layer).weight.shape[axis]
        sizes = {d: part.dimensions[d].sizes.get(layer, part.dimensions[d].size)(module) for d in along}
        widths = {d: sizes[d] * part.dimensions[d].count(module) for d in along}
        if len(along) == 1 and widths[key] and length % widths[key] == 0:
            along *= length // widths[key]  # gated layers hold it twice
        if sum(widths[d] for d in along) != length:
            raise _Odd
        ends = [0, *accumulate(widths[d] for d in along)]
        starts = tuple(start for start, d in zip(ends, along, strict=False) if d == key)
        found.append(Slices(f"{name}.{layer}", starts, sizes[key]))
    return tuple(found)
