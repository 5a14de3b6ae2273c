"""A family's row resolved on one model: full names, only what is there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.families import Family, Heads, Neurons, find_family


@dataclass(frozen=True)
class WiredSite:
    """A distinct layer input of the model, named after the first layer that reads it."""

    layers: tuple[str, ...]
    text: bool
    block: int

    @property
    def name(self) -> str:
        return self.layers[0]


@dataclass(frozen=True)
class WiredGroups:
    """The heads of one attention, or the neurons of one feed-forward module.

    Attributes:
        name: The attention or feed-forward module.
        kind: "heads" or "ffn".
        producers: Layers whose output rows belong to the groups; ``slabs`` equal slabs of count · size rows each.
        consumers: Layers whose input columns belong to the groups.
        count: Groups.
        size: Channels per group (head_dim, or 1).
    """

    name: str
    kind: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    count: int
    size: int
    slabs: int
    block: int


@dataclass(frozen=True)
class Wiring:
    """Everything prunable in one denoiser."""

    denoiser: nn.Module
    family: Family
    sites: tuple[WiredSite, ...]
    groups: tuple[WiredGroups, ...]
    num_blocks: int

    @cached_property
    def site_of(self) -> dict[str, WiredSite]:
        """The site that each layer reads."""
        return {layer: site for site in self.sites for layer in site.layers}

    def layer(self, name: str) -> nn.Module:
        """The layer called ``name``."""
        return self.denoiser.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """The weight of the layer called ``name``."""
        weight = self.layer(name).weight
        assert isinstance(weight, Tensor)
        return weight


def denoiser_of(pipe: Any) -> nn.Module:
    """The transformer or UNet of a pipeline.

    Raises:
        UserError: It has none, or a compiled one.
    """
    for name in ("transformer", "unet"):
        denoiser = getattr(pipe, name, None)
        if hasattr(denoiser, "_orig_mod"):
            raise UserError(
                f"the {name} is compiled, which hides its layers; use pipe.{name} = pipe.{name}._orig_mod, and compile "
                "again afterwards"
            )
        if isinstance(denoiser, nn.Module):
            return denoiser
    raise UserError(f"{type(pipe).__name__} has neither a transformer nor a unet; nothing to prune")


def shrunk_of(denoiser: nn.Module) -> dict[str, Any] | None:
    """The ``shrunk`` entry of a denoiser's config (sizes of its cut layers), or None if nothing was cut out of it."""
    config: Any = denoiser.config
    found: dict[str, Any] | None = config.get("shrunk")
    return found


def wire(denoiser: nn.Module) -> Wiring:
    """Resolve the family row of ``denoiser`` on its blocks.

    Raises:
        UserError: The class is not supported.
    """
    family = find_family(denoiser)
    blocks = denoiser.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    sites: list[WiredSite] = []
    groups: list[WiredGroups] = []
    for index, block in enumerate(blocks):
        here = {name for name, _ in block.named_modules()}
        prefix = f"{family.blocks}.{index}."
        for site in family.sites:
            if layers := tuple(prefix + layer for layer in site.layers if layer in here):
                sites.append(WiredSite(layers, site.text, index))
        groups += [_wire_heads(block, heads, here, prefix, index) for heads in family.heads if heads.attention in here]
        groups += [_wire_neurons(block, neurons, prefix, index) for neurons in family.neurons if neurons.ffn in here]
    return Wiring(denoiser, family, tuple(sites), tuple(groups), len(blocks))


def _wire_heads(block: nn.Module, heads: Heads, here: set[str], prefix: str, index: int) -> WiredGroups:
    attention: Any = block.get_submodule(heads.attention)
    producers = [layer for layer in heads.producers if layer in here]
    consumers = [layer for layer in heads.consumers if layer in here]
    width: Any = getattr(block.get_submodule(consumers[0]), "in_features", 0)  # odd layers are refused later
    return WiredGroups(
        prefix + heads.attention,
        "heads",
        tuple(prefix + layer for layer in producers),
        tuple(prefix + layer for layer in consumers),
        count=attention.heads,
        size=width // attention.heads,
        slabs=1,
        block=index,
    )


def _wire_neurons(block: nn.Module, neurons: Neurons, prefix: str, index: int) -> WiredGroups:
    width: Any = getattr(block.get_submodule(neurons.consumer), "in_features", 0)
    return WiredGroups(
        prefix + neurons.ffn,
        "ffn",
        (prefix + neurons.producer,),
        (prefix + neurons.consumer,),
        count=width,
        size=1,
        slabs=neurons.rows,
        block=index,
    )
