"""What gets one value each, and the values it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from obsdiff.errors import UserError
from obsdiff.models.graph import Graph, pays
from obsdiff.obs.pattern import DIRECTIONS, NM, Depth, Hybrid, Pattern, Unstructured
from obsdiff.pruning.options import Limits
from obsdiff.pruning.plan import Plan, kept_units

STEP = 0.01  # between two ratios of an unstructured layer
HIGHEST = 0.98  # of unstructured ratios, unless a ceiling says otherwise or the total comes near it


@dataclass(frozen=True)
class Unit:
    """Layers, or attention and feed-forward modules, that get one value.

    Attributes:
        members: Their names.
        stage: The first stage that holds one of them.
        options: Patterns it may get, by rising share removed.
        beside_ranks: Whether it shares the budget with ranks of vectors.
    """

    members: tuple[str, ...]
    stage: int
    options: tuple[Pattern, ...]
    beside_ranks: bool = False

    @property
    def name(self) -> str:
        return " ".join(self.members)


def removed(pattern: Pattern) -> float:
    """The share that a pattern removes (structured: a module's own, the other share of the pattern is 0)."""
    return pattern.sparsity


def make_units(graph: Graph, plan: Plan, limits: Limits) -> list[Unit]:
    """One unit per entry of ``plan``, or per sharing rule, in the order of a forward pass.

    Raises:
        UserError: A name pattern matches nothing, two rules share a layer, a floor is above its ceiling or leaves no
            option, or members of a rule differ in size.
    """
    if limits.choices and not isinstance(plan.pattern, NM):
        raise UserError(f"--limits.choices are for N:M patterns; the pattern is {plan.pattern}")
    groups = graph.group_of
    blocks = {name: groups[name].stage if plan.structured else graph.layers[name] for name in plan.entries}
    for option, rules in (
        ("floors", limits.floors),
        ("ceilings", limits.ceilings),
        ("share", limits.share),
    ):
        for rule in rules:
            if not any(fnmatchcase(name, rule) for name in blocks):
                raise UserError(f"--limits.{option}: {rule!r} matches none of the {len(blocks)} names in the plan")
    assert not isinstance(plan.pattern, Depth | Hybrid)  # such a plan has no entries, or is parted before
    units = []
    kinds = {groups[name].kind for name in plan.entries} if plan.structured else set()
    for members in _shared(list(plan.entries), limits.share):
        options = [_options(graph, plan.pattern, name, limits) for name in members]
        common = tuple(pattern for pattern in options[0] if all(pattern in other for other in options[1:]))
        if len(common) < min(2, *(len(found) for found in options)):
            raise UserError(
                f"{members[0]} and {members[-1]} have no ratio or width in common within their limits; they cannot "
                "share one"
            )
        beside = bool(kinds & set(DIRECTIONS)) and groups[members[0]].kind not in DIRECTIONS
        units.append(Unit(members, min(blocks[name] for name in members), common, beside))
    return sorted(units, key=lambda unit: unit.stage)


def _shared(names: Sequence[str], rules: Sequence[str]) -> list[tuple[str, ...]]:
    """The names, those of one rule together."""
    rule_of: dict[str, str] = {}
    for rule in rules:
        for name in names:
            if fnmatchcase(name, rule):
                if name in rule_of:
                    raise UserError(f"--limits.share: {name} is in both {rule_of[name]!r} and {rule!r}")
                rule_of[name] = rule
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(rule_of.get(name, name), []).append(name)
    return [tuple(members) for members in together.values()]


def _options(graph: Graph, pattern: Pattern, name: str, limits: Limits) -> list[Pattern]:
    groups = graph.group_of.get(name)
    floor = _limit(limits.floors, name, 0.0)
    highest = max(HIGHEST, (1 + pattern.ratio) / 2) if isinstance(pattern, Unstructured) else 1.0
    ceiling = _limit(limits.ceilings, name, highest)
    if floor > ceiling:
        raise UserError(f"{name}: its floor {floor:g} is above its ceiling {ceiling:g}")
    if isinstance(pattern, Unstructured):
        steps = [round(STEP * i, 4) for i in range(round(1 / STEP))]
        inside = sorted({floor, ceiling, *(ratio for ratio in steps if floor <= ratio <= ceiling)})
        return [Unstructured(ratio) for ratio in inside if ratio < 1]
    every: list[Pattern]
    if isinstance(pattern, NM):
        every = _nm_options(pattern, limits.choices)
    else:
        assert groups is not None
        choices = pattern.choices(groups.kind, groups.count)
        every = [option for option in choices if pays(graph, groups, kept_units(groups, option))]
    found = [option for option in every if floor <= removed(option) <= ceiling]
    if not found:
        shares = ", ".join(f"{removed(option):.3g}" for option in every[:8])
        raise UserError(f"{name}: no choice between floor {floor:g} and ceiling {ceiling:g}; there are {shares}, ...")
    return found


def _nm_options(pattern: NM, choices: Sequence[str]) -> list[Pattern]:
    """Dense and every N of M, or of these the ones that were named."""
    every: dict[str, Pattern] = {"dense": Unstructured(0.0)}
    every |= {f"{n}:{pattern.m}": NM(n, pattern.m) for n in range(pattern.m - 1, 0, -1)}
    if unknown := [choice for choice in choices if choice not in every]:
        raise UserError(f"--limits.choices: {unknown[0]!r} is none of {', '.join(every)}")
    return [option for name, option in every.items() if not choices or name in choices]


def _limit(rules: Mapping[str, float], name: str, default: float) -> float:
    """What the last rule that matches a name says."""
    return float([default, *(given for rule, given in rules.items() if fnmatchcase(name, rule))][-1])
