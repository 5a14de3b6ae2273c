"""Which layers are pruned, and each one's pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from obsdiff.errors import UserError
from obsdiff.models.checks import check_plain
from obsdiff.models.wiring import WiredGroups, Wiring
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.pattern import NM, Pattern, Structured, Unstructured


@dataclass(frozen=True)
class Plan:
    """A pattern per layer (unstructured, N:M), or per attention and feed-forward module (structured).

    Attributes:
        pattern: The pattern that was asked for.
        entries: Pattern by name, in the order of a forward pass; a layer that stays dense has ratio 0.
        rule: How the entries were chosen: "uniform", "measured", "owl", or what a plan file says.
        budget: What they had to meet, such as "sparsity:0.5"; None: just ``pattern`` for all.
    """

    pattern: Pattern
    entries: dict[str, Pattern]
    rule: str = "uniform"
    budget: str | None = None

    @property
    def structured(self) -> bool:
        return isinstance(self.pattern, Structured)

    def layers(self, wiring: Wiring) -> list[str]:
        """Names of all layers that the plan changes."""
        if not self.structured:
            return list(self.entries)
        return [
            layer
            for groups in wiring.groups
            if groups.name in self.entries
            for layer in (*groups.producers, *groups.consumers)
        ]

    def sites(self, wiring: Wiring) -> set[str]:
        """Names of the sites whose statistics the plan needs."""
        if not self.structured:
            return {wiring.site_of[layer].name for layer in self.entries}
        return {
            wiring.site_of[layer].name
            for groups in wiring.groups
            if groups.name in self.entries
            for layer in groups.consumers
        }


def make_plan(
    wiring: Wiring,
    pattern: Pattern,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
) -> Plan:
    """The same pattern for every layer that is chosen.

    Args:
        wiring: What there is.
        pattern: What to do with it.
        include: Shell-style name patterns; a layer must match one of them (none given: all layers).
        exclude: Shell-style name patterns; a layer must match none of them.
        spare_blocks: Blocks to leave alone, negative ones from the end. None: the first and last block for structured
            patterns, as the paper does (OBS-Diff tables 4 and 9), no block otherwise.

    Raises:
        UserError: A name pattern or block matches nothing, nothing is left to prune, or a width does not divide.
    """
    structured = isinstance(pattern, Structured)
    if spare_blocks is None:
        spare_blocks = (0, -1) if structured else ()
    spared = set()
    for block in spare_blocks:
        if not -wiring.num_blocks <= block < wiring.num_blocks:
            raise UserError(f"cannot spare block {block}: the denoiser has blocks 0 to {wiring.num_blocks - 1}")
        spared.add(block % wiring.num_blocks)
    blocks = (
        {groups.name: groups.block for groups in wiring.groups}
        if structured
        else {layer: site.block for layer, site in wiring.site_of.items()}
    )
    _check_matches(include, blocks, "include")
    _check_matches(exclude, blocks, "exclude")
    chosen = [
        name
        for name, block in blocks.items()
        if block not in spared
        and (not include or any(fnmatchcase(name, rule) for rule in include))
        and not any(fnmatchcase(name, rule) for rule in exclude)
    ]
    if not chosen:
        raise UserError(
            f"the plan matches no layer: include {list(include)}, exclude {list(exclude)}, spared blocks "
            f"{sorted(spared)} leave nothing of {len(blocks)} candidates such as {next(iter(blocks))}"
        )
    plan = Plan(pattern, dict.fromkeys(chosen, pattern))
    check_fit(wiring, plan)
    return plan


def _check_matches(rules: Sequence[str], names: dict[str, int], option: str) -> None:
    for rule in rules:
        if not any(fnmatchcase(name, rule) for name in names):
            raise UserError(f"--{option} {rule!r} matches none of {len(names)} names such as {next(iter(names))}")


def check_fit(wiring: Wiring, plan: Plan) -> None:
    """Refuse layers that are no plain ones, N:M patterns that do not divide a layer's inputs, and widths of which a
    layer does not hold one multiple.

    Raises:
        UserError: Naming the layer.
    """
    check_plain(wiring.denoiser, plan.layers(wiring))
    for groups in wiring.groups:
        pattern = plan.entries.get(groups.name)
        if not isinstance(pattern, Structured) or groups.kind != "ffn" or pattern.ffn == 0:
            continue
        if (pattern.multiple_of or 1) > groups.count:
            raise UserError(
                f"multiple_of {pattern.multiple_of} does not fit {groups.name}: it has {groups.count} neurons; "
                "choose a smaller multiple"
            )
    for name, pattern in plan.entries.items():
        if isinstance(pattern, NM):
            columns = weight_matrices(wiring.layer(name)).shape[-1]
            if columns % pattern.m:
                raise UserError(
                    f"pattern {pattern} does not fit layer {name}: its {columns} inputs are not a multiple of "
                    f"{pattern.m}; choose another M or exclude the layer"
                )


def kept_groups(groups: WiredGroups, pattern: Structured) -> int:
    """How many heads or neurons of ``groups`` stay."""
    return pattern.kept_heads(groups.count) if groups.kind == "heads" else pattern.kept_neurons(groups.count)


def packages_of(wiring: Wiring, plan: Plan, packages: int) -> list[list[str]]:
    """Cut the plan's sites into ``packages`` contiguous near-equal runs, in the order of a forward pass.

    The first packages are one site larger where it does not divide (OBS-Diff §4.2). More packages than sites give one
    site each. Heads fused over two streams stay in one package.
    """
    needed = plan.sites(wiring)
    units: list[list[str]] = []
    together = {}
    if plan.structured:
        for groups in wiring.groups:
            if groups.name in plan.entries:
                for layer in groups.consumers:
                    together[wiring.site_of[layer].name] = groups.name
    last = None
    for site in wiring.sites:
        if site.name in needed:
            unit = together.get(site.name, site.name)
            if unit == last:
                units[-1].append(site.name)
            else:
                units.append([site.name])
            last = unit
    packages = min(packages, len(units))
    size, larger = divmod(len(units), packages)
    cuts = [0]
    for i in range(packages):
        cuts.append(cuts[-1] + size + (i < larger))
    return [[name for unit in units[a:b] for name in unit] for a, b in pairwise(cuts)]


def describe(pattern: Pattern) -> str:
    """For people: what the pattern does."""
    if isinstance(pattern, Unstructured):
        return f"{pattern.ratio:.1%} of the weights of each layer become zero"
    if isinstance(pattern, NM):
        return f"{pattern.n} of every {pattern.m} consecutive weights stay"
    return f"{pattern.heads:.1%} of the heads and {pattern.ffn:.1%} of the FFN neurons go"
