"""Which layers are pruned, and each one's pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

from obsdiff.errors import UserError
from obsdiff.models.checks import check_plain
from obsdiff.models.graph import Graph, Group, Site, pays
from obsdiff.models.subject import refusals
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.pattern import DIRECTIONS, LOWRANK, NM, RANK, Hybrid, Pattern, Request, Structured, Unstructured

WEIGHT = ".weight"  # ends the names of entries that are of a layer's single weights, beside entries of modules


@dataclass(frozen=True)
class Plan:
    """A pattern per layer (unstructured, N:M), or per attention and feed-forward module (structured), or both.

    Attributes:
        pattern: The pattern that was asked for.
        entries: Pattern by name, in the order of a forward pass; a layer that stays dense has ratio 0. Where single
            weights go after units, first those of modules, then by ``LAYER.weight`` those of what is left of layers.
        rule: How the entries were chosen: "uniform", "measured", "owl", or what a plan file says.
        budget: What they had to meet, such as "sparsity:0.5"; None: just ``pattern`` for all.
        dead: Layers among the entries that reach no output and become zero whatever their entry says.
        removed: Stages that go whole before anything else, by their names in the whole denoiser; the entries are of
            what is left.
    """

    pattern: Request
    entries: dict[str, Pattern]
    rule: str = "uniform"
    budget: str | None = None
    dead: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def structured(self) -> bool:
        """Whether it cuts units or directions out."""
        return isinstance(self.pattern, Structured | Hybrid)

    @property
    def modules(self) -> dict[str, Structured]:
        """The pattern of each module that is cut."""
        return {name: pattern for name, pattern in self.entries.items() if isinstance(pattern, Structured)}

    @property
    def weights(self) -> dict[str, Unstructured | NM]:
        """By layer, the pattern of its single weights."""
        found = {name: pattern for name, pattern in self.entries.items() if not isinstance(pattern, Structured)}
        return {name.removesuffix(WEIGHT): pattern for name, pattern in found.items()} if self.structured else found

    def layers(self, graph: Graph) -> list[str]:
        """Names of all layers that the plan changes."""
        cut = (layer for group in self.groups(graph) for layer in group.layers) if self.structured else ()
        return list(dict.fromkeys([*cut, *self.weights]))

    def groups(self, graph: Graph) -> list[Group]:
        """The groups that a structured plan names, in the order of a forward pass."""
        return [group for group in graph.groups if group.name in self.entries]

    def sites(self, graph: Graph) -> set[str]:
        """Names of the sites whose statistics the plan needs."""
        cut = (s.layer for group in self.groups(graph) for s in group.consumers) if self.structured else ()
        return {graph.site_of[layer].name for layer in (*cut, *self.weights)}


def make_plan(
    graph: Graph,
    pattern: Pattern | Hybrid,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
) -> Plan:
    """The same pattern for every layer that is chosen.

    Args:
        graph: What there is.
        pattern: What to do with it.
        include: Shell-style name patterns; a layer must match one of them (none given: all layers).
        exclude: Shell-style name patterns; a layer must match none of them.
        spare_blocks: Stages to leave alone, by number in the order of execution, negative ones from the end. None: for
            structured patterns what the family's row says, the first and last one unless the paper does otherwise
            (OBS-Diff tables 4 and 9); no stage otherwise.

    Raises:
        UserError: A name pattern or block matches nothing, nothing is left to prune, or a width does not divide.
    """
    if isinstance(pattern, Hybrid):
        return _both(graph, pattern, include, exclude, spare_blocks)
    structured = isinstance(pattern, Structured)
    if (
        isinstance(pattern, Structured)
        and pattern.cuts
        and not any(group.kind in pattern.kinds for group in graph.groups)
    ):
        raise UserError(
            f"nothing can be cut out of a {graph.family.denoiser} by {pattern}: "
            + ("none of its blocks is known" if graph.family.known else "obsdiff knows this class by tracing alone")
            + "; use unstructured:RATIO or N:M (docs/adding-a-family.md says how to add it)"
        )
    if isinstance(pattern, Structured):
        _check_rank(graph, pattern)
    if spare_blocks is None:
        spare_blocks = graph.family.spare if structured and len(graph.stages) > 2 else ()
    number = len(graph.stages)
    spared = set()
    for block in spare_blocks:
        if not -number <= block < number:
            raise UserError(f"cannot spare block {block}: the denoiser has blocks 0 to {number - 1}")
        spared.add(block % number)
    kinds = pattern.kinds if isinstance(pattern, Structured) else ()
    groups = {group.name: group for group in graph.groups if group.kind in kinds}
    blocks = {name: group.stage for name, group in groups.items()} if structured else dict(graph.layers)
    reasons = refusals(graph.denoiser, graph.family) if structured and graph.family.refused else {}
    _check_matches(include, blocks, "include", reasons)
    _check_matches(exclude, blocks, "exclude", reasons)
    chosen = [
        name
        for name, block in blocks.items()
        if (block not in spared or (name in groups and _of_all_blocks(graph, groups[name])))
        and (not include or any(fnmatchcase(name, rule) for rule in include))
        and not any(fnmatchcase(name, rule) for rule in exclude)
    ]
    if not chosen:
        raise UserError(
            f"the plan matches no layer: include {list(include)}, exclude {list(exclude)}, spared blocks "
            f"{sorted(spared)} leave nothing of {len(blocks)} candidates such as {next(iter(blocks))}"
        )
    if isinstance(pattern, Structured):
        _check_kinds(graph, pattern, chosen)
        _check_pays(graph, pattern, [groups[name] for name in chosen])
    plan = Plan(pattern, {name: _own(graph, pattern, groups.get(name)) for name in chosen})
    check_fit(graph, plan)
    return plan


def _both(
    graph: Graph,
    pattern: Hybrid,
    include: Sequence[str],
    exclude: Sequence[str],
    spare_blocks: Sequence[int] | None,
) -> Plan:
    return with_weights(graph, *parts_of_hybrid(graph, pattern, include, exclude, spare_blocks))


def parts_of_hybrid(
    graph: Graph,
    pattern: Hybrid,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
) -> tuple[Plan, Plan]:
    """What is cut, and the same pattern for the single weights of every layer that is chosen, as if nothing were; a
    rule need not match both names of modules and names of layers. :func:`with_weights` joins them."""
    modules, layers = [group.name for group in graph.groups if group.kind in pattern.first.kinds], list(graph.layers)
    for option, rules in (("include", include), ("exclude", exclude)):
        _check_matches(rules, dict.fromkeys([*modules, *layers], 0), option, {})

    def plan(names: Sequence[str], what: Pattern) -> Plan:
        within, without = ([r for r in rules if any(fnmatchcase(n, r) for n in names)] for rules in (include, exclude))
        if include and not within:
            raise UserError(f"include {list(include)} leaves nothing for {what}; widen it, or leave {what} out")
        return make_plan(graph, what, within, without, spare_blocks)

    return plan(modules, pattern.first), plan(layers, pattern.then)


def with_weights(graph: Graph, cut: Plan, weights: Plan) -> Plan:
    """A plan of modules, with the single weights of what it leaves of layers.

    Layers whose kept inputs are no multiple of an N:M pattern's M keep all weights that they have then; those that read
    directions have no part in it: what was measured is their input, not what a basis makes of it.
    """
    assert isinstance(cut.pattern, Structured) and isinstance(weights.pattern, Unstructured | NM)
    inputs = kept_inputs(graph, cut.modules)
    entries: dict[str, Pattern] = dict(cut.modules)
    reading = reading_directions(graph, cut)
    for layer, pattern in weights.weights.items():
        if layer not in reading:
            fits = not isinstance(pattern, NM) or inputs[layer] % pattern.m == 0
            entries[layer + WEIGHT] = pattern if fits else Unstructured(0.0)
    return replace(cut, pattern=Hybrid(cut.pattern, weights.pattern), entries=entries)


def reading_directions(graph: Graph, plan: Plan) -> set[str]:
    """Layers with single weights that a plan lets read directions of their input."""
    groups = [graph.group_of[name] for name, pattern in plan.modules.items() if loses(graph.group_of[name], pattern)]
    return {layer for group in groups if group.basis is not None for layer in group.layers} & graph.layers.keys()


def parted(plan: Plan) -> tuple[Plan, Plan | None]:
    """What a plan cuts (or all that it does), and what it does to single weights afterwards."""
    if not isinstance(plan.pattern, Hybrid):
        return plan, None
    cut = replace(plan, pattern=plan.pattern.first, entries=dict(plan.modules))
    return cut, Plan(plan.pattern.then, dict(plan.weights))


def kept_inputs(graph: Graph, modules: Mapping[str, Structured]) -> dict[str, int]:
    """Columns of each layer's weight, as a matrix, that are left where modules are cut."""
    found = {layer: weight_matrices(graph.layer(layer)).shape[-1] for layer in graph.layers}
    for name, pattern in modules.items():
        group = graph.group_of[name]
        for s in () if group.basis is not None else group.consumers:
            places = graph.weight(s.layer).shape[2:].numel()  # of a convolution's kernel; a linear layer has one
            found[s.layer] -= (group.count - kept_units(group, pattern)) * s.size * len(s.starts) * places
    return found


def _of_all_blocks(graph: Graph, group: Group) -> bool:
    """Whether a group belongs to no single block, such as a vector, or tokens that many blocks read."""
    stage = f"{graph.stages[group.stage]}."
    return group.basis is not None and (group.kind == RANK or not all(n.startswith(stage) for n in group.layers))


def _check_rank(graph: Graph, pattern: Structured) -> None:
    """Refuse a rank where nothing has one, or above all widths."""
    for kind, kept in pattern.directions.items():
        there = [group for group in graph.groups if group.kind == kind]
        if not there:
            what = "one vector per sample" if kind == RANK else "tokens and give queries, keys and values"
            raise UserError(
                f"{pattern} reduces the rank of layers that read {what}, and a {graph.family.denoiser} has none in its "
                f"blocks that is whole; leave {kind} out"
            )
        widest = max(group.count for group in there)
        if kept > widest:
            raise UserError(f"{pattern} asks for a rank above the width {widest}; choose a smaller one")


def _check_pays(graph: Graph, pattern: Structured, chosen: Sequence[Group]) -> None:
    """Refuse a rank of tokens that leaves everything chosen whole: a basis would cost more than it saves."""
    there = [group for group in chosen if group.kind == LOWRANK and pattern.kept(LOWRANK, group.count) < group.count]
    if there and not any(pays(graph, group, pattern.kept(LOWRANK, group.count)) for group in there):
        raise UserError(f"{pattern} makes nothing smaller: directions have weights of their own; choose fewer")


def _own(graph: Graph, pattern: Pattern, group: Group | None) -> Pattern:
    """What a pattern says to one of the layers or groups; tokens at a rank that makes nothing smaller stay whole."""
    if group is None or not isinstance(pattern, Structured):
        return pattern
    whole = group.kind == LOWRANK and not pays(graph, group, pattern.kept(LOWRANK, group.count))
    return Structured(0.0, 0.0) if whole else pattern.of(group.kind, group.count)


def _check_kinds(graph: Graph, pattern: Structured, chosen: Sequence[str]) -> None:
    """Refuse a pattern that names kinds of units of which there are none to remove."""
    there = list(dict.fromkeys(group.kind for group in graph.groups if group.kind not in DIRECTIONS))
    left = {graph.group_of[name].kind for name in chosen}
    for kind in pattern.named:
        if kind not in there:
            raise UserError(
                f"{pattern} names {kind}, and a {graph.family.denoiser} has none that can be cut (it has "
                f"{' and '.join(there)}); leave {kind} out"
            )
        if kind not in left:
            raise UserError(
                f"{pattern} names {kind}, of which include, exclude and spared blocks leave none; choose others or "
                f"leave {kind} out"
            )


def _check_matches(rules: Sequence[str], names: Mapping[str, int], option: str, refused: Mapping[str, str]) -> None:
    for rule in rules:
        if any(fnmatchcase(name, rule) for name in names):
            continue
        for name, reason in refused.items():
            if fnmatchcase(name, rule):
                raise UserError(
                    f"--{option} {rule!r} names what cannot be cut, such as {name}: {reason}; single weights of its "
                    "layers can go (unstructured:RATIO, N:M)"
                )
        raise UserError(
            f"--{option} {rule!r} matches none of {len(names)} names; they are such as {', '.join(likely(rule, names))}"
        )


def likely(wrong: str, names: Iterable[str]) -> list[str]:
    """Up to three names that ``wrong`` may have meant: the nearest ones, else the first."""
    listed = list(names)
    return get_close_matches(wrong.strip("*"), listed, 3, 0.5) or listed[:3]


def check_fit(graph: Graph, plan: Plan) -> None:
    """Refuse layers that are no plain ones, N:M patterns that do not divide a layer's inputs, and widths of which a
    layer does not hold one multiple.

    Raises:
        UserError: Naming the layer.
    """
    check_plain(graph.denoiser, plan.layers(graph))
    for group in plan.groups(graph) if plan.structured else ():
        pattern = plan.modules[group.name]
        multiple = (pattern.multiple_of or 1) if group.kind == "ffn" else 1
        if pattern.share(group.kind) > 0 and multiple > group.count:
            raise UserError(
                f"multiple_of {multiple} does not fit {group.name}: it has {group.count} neurons; choose a smaller "
                "multiple"
            )
    inputs = kept_inputs(graph, plan.modules)
    for name, single in plan.weights.items():
        if isinstance(single, NM) and inputs[name] % single.m:
            raise UserError(
                f"pattern {single} does not fit layer {name}: its {inputs[name]} inputs are not a multiple of "
                f"{single.m}; choose another M or exclude the layer"
            )


def kept_units(group: Group, pattern: Structured) -> int:
    """How many units of a group stay."""
    return pattern.kept(group.kind, group.count)


def loses(group: Group, pattern: Structured) -> bool:
    """Whether a pattern changes a group: one on a basis that keeps all directions needs none."""
    return group.basis is None or kept_units(group, pattern) < group.count


def cut_bundles(graph: Graph, plan: Plan, package: Collection[str] | None = None) -> list[list[Group]]:
    """Groups that a plan changes, those together that are cut in one go, whose sites are in a package (None: all)."""
    modules = plan.modules if plan.structured else {}
    found = graph.bundles([name for name, pattern in modules.items() if loses(graph.group_of[name], pattern)])
    return [b for b in found if package is None or graph.site_of[b[0].consumers[0].layer].name in package]


def masked_sites(graph: Graph, plan: Plan, package: Collection[str] | None = None) -> list[Site]:
    """Sites of a package (None: all) whose layers lose single weights."""
    masked = plan.weights.keys()
    return [site for site in graph.sites if (package is None or site.name in package) and masked & set(site.layers)]


def joint_sites(graph: Graph, plan: Plan) -> list[list[str]]:
    """The plan's sites in the order of a forward pass, those of groups that are cut in one go (heads fused over two
    streams) together."""
    needed = plan.sites(graph)
    together = {
        graph.site_of[s.layer].name: i
        for i, bundle in enumerate(graph.bundles(list(plan.entries)) if plan.structured else ())
        for group in bundle
        for s in group.consumers
    }
    of_unit: dict[int | str, list[str]] = {}
    for site in (*graph.vectors, *graph.sites):
        if site.name in needed:
            of_unit.setdefault(together.get(site.name, site.name), []).append(site.name)
    return list(of_unit.values())


def stage_packages(graph: Graph, plan: Plan) -> list[list[str]]:
    """The plan's sites, those of one stage together, in the order of a forward pass."""
    found: dict[int, list[str]] = {}
    for names in joint_sites(graph, plan):
        found.setdefault(min(graph.site_of[name].stage for name in names), []).extend(names)
    return [found[stage] for stage in sorted(found)]


def packages_of(graph: Graph, plan: Plan, packages: int) -> list[list[str]]:
    """Cut the plan's sites into ``packages`` contiguous near-equal runs, in the order of a forward pass.

    The first packages are one site larger where it does not divide (OBS-Diff §4.2). More packages than sites give one
    site each. Sites of groups that are cut in one go stay in one package.
    """
    units = joint_sites(graph, plan)
    packages = min(packages, len(units))
    size, larger = divmod(len(units), packages)
    cuts = [0]
    for i in range(packages):
        cuts.append(cuts[-1] + size + (i < larger))
    return [[name for unit in units[a:b] for name in unit] for a, b in pairwise(cuts)]
