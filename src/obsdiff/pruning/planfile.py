"""Plans as YAML: written by every prune run, readable and writable by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from obsdiff.errors import UserError
from obsdiff.files import write_text
from obsdiff.models.content import model_hash
from obsdiff.models.graph import Graph
from obsdiff.models.subject import refusals
from obsdiff.obs.pattern import NM, Hybrid, Structured, of_layers, of_units, parse_pattern, parse_request
from obsdiff.pruning.plan import WEIGHT, Plan, check_fit, likely, parted, reading_directions
from obsdiff.yamlfiles import read_yaml

FILE = "plan.yaml"
FORMAT = 1
_KEYS = {"format", "denoiser", "model", "pattern", "rule", "budget", "dead", "removed", "layers"}


def write_plan(plan: Plan, path: Path, denoiser: str, model: str | None) -> None:
    """Write ``plan``.

    Args:
        plan: The plan.
        path: The file.
        denoiser: Class of the dense denoiser.
        model: Hash of its dense weights (:func:`obsdiff.pruning.statistics.model_hash`); None leaves it out, then the
            plan fits every denoiser with these layers.
    """
    import yaml

    content = {
        "format": FORMAT,
        "denoiser": denoiser,
        "model": model,
        "pattern": str(plan.pattern),
        "rule": plan.rule,
        "budget": plan.budget,
        "dead": list(plan.dead) or None,
        "removed": list(plan.removed) or None,
        "layers": {name: str(pattern) for name, pattern in plan.entries.items()},
    }
    written = {key: value for key, value in content.items() if value is not None}
    write_text(path, yaml.safe_dump(written, sort_keys=False, width=120))


def parse_plan(path: str | Path) -> tuple[Plan, dict[str, Any]]:
    """The plan in a file, and the file's content, not checked against a model.

    Needed are ``pattern`` (its kind is that of all entries) and ``layers``: a pattern by layer name, or for structured
    plans by attention and feed-forward module, and by ``LAYER.weight`` where single weights go too; "dense" is a
    pattern too. ``removed`` lists stages that go first; then
    the layers are those of what is left, and of depth alone there are none.

    Raises:
        UserError: The file is missing, is no plan, or holds an impossible pattern.
    """
    content = read_yaml(path, "plan")
    removed = content.get("removed", [])
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
        raise UserError(f"plan {path}: removed is {_shown(removed)}; it must be a list of stages")
    if doubled := [name for name in dict.fromkeys(removed) if removed.count(name) > 1]:
        raise UserError(f"plan {path}: removed names {_shown(doubled[0])} more than once; a stage can go once")
    if not isinstance(content.get("layers"), dict) or not (content["layers"] or removed):
        raise UserError(f"{path} is not a plan; it needs 'pattern' and 'layers' (a pattern by layer name)")
    if unknown := sorted(str(key) for key in content.keys() - _KEYS):
        raise UserError(f"plan {path} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"plan {path} has format {_shown(content['format'])}; this version reads {FORMAT}")
    for key in ("denoiser", "model", "rule", "budget"):
        if not isinstance(content.get(key, ""), str):
            raise UserError(f"plan {path}: {key} is {_shown(content[key])}; it must be text")
    if not isinstance(content.get("pattern", ""), str):
        raise UserError(f"plan {path}: unknown pattern {_shown(content['pattern'])}")
    pattern = parse_request(content.get("pattern", ""))
    layered = of_layers(pattern)
    if bool(content["layers"]) is (layered is None) or (layered is not pattern and not removed):
        raise UserError(f"plan {path}: {pattern} does not go with its 'layers' and 'removed' (the stages that go)")
    entries = {}
    for name, text in content["layers"].items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(f"plan {path}, {_shown(name)}: unknown pattern {_shown(text)}")
        both = isinstance(layered, Hybrid)
        structured = not name.endswith(WEIGHT) if both else isinstance(layered, Structured)
        dense = "structured:0" if structured else "unstructured:0"
        try:
            entries[name] = parse_pattern(dense if text == "dense" else text)
        except UserError as error:
            raise UserError(f"plan {path}, {name}: {error}") from None
        if isinstance(entries[name], Structured) is not structured:
            hint = f"single weights are of LAYER{WEIGHT}" if both else "structured plans are apart"
            raise UserError(f"plan {path}, {name}: {text} does not go with {pattern}; {hint}")
    dead = content.get("dead", [])
    cuts = of_units(pattern) is not None
    if not isinstance(dead, list) or any(name not in entries for name in dead) or (dead and cuts):
        raise UserError(f"plan {path}: dead is {_shown(dead)}; it must be a list of layers that the plan names")
    rule, budget = content.get("rule", "file"), content.get("budget")
    return Plan(layered or pattern, entries, rule, budget, tuple(dead), tuple(removed)), content


def read_plan(path: str | Path, graph: Graph) -> Plan:
    """The plan in a file, checked against a denoiser, in the order of its forward pass.

    Raises:
        UserError: As :func:`parse_plan`; or it was made for another model, or names layers that are not there.
    """
    plan, content = parse_plan(path)
    made_for = content.get("denoiser", graph.family.denoiser)
    if made_for != graph.family.denoiser:
        raise UserError(f"plan {path} was made for a {made_for}; this pipeline has a {graph.family.denoiser}")
    if plan.entries and not plan.removed:  # otherwise they are of what will be left
        plan = fitted_plan(plan, graph, f"plan {path}")
    if content.get("model") not in (None, model_hash(graph.denoiser)):
        raise UserError(
            f"plan {path} was made for other weights of a {made_for}; remove its 'model' line to use it all the same"
        )
    return plan


def fitted_plan(plan: Plan, graph: Graph, what: str = "the plan") -> Plan:
    """``plan`` in the order of a forward pass.

    Raises:
        UserError: It is empty, names what is not there, or an N:M pattern does not divide a layer's inputs.
    """
    there = [groups.name for groups in graph.groups] if plan.structured else list(graph.layers)
    if plan.structured and parted(plan)[1] is not None:
        there += [layer + WEIGHT for layer in graph.layers]
    if not plan.entries:
        raise UserError(f"{what} names no layer")
    if plan.structured and not graph.groups:
        raise UserError(f"{what} is structured, and nothing can be cut out of a {graph.family.denoiser}")
    if unknown := [name for name in plan.entries if name not in there]:
        kind = "attention or feed-forward module" if plan.structured else "prunable layer"
        refused = refusals(graph.denoiser, graph.family) if plan.structured else {}
        for name in unknown:
            if name in refused:
                raise UserError(f"{what} names {name}, which cannot be cut: {refused[name]}")
        raise UserError(
            f"{what} names {len(unknown)} that this denoiser has no {kind} for, such as {unknown[0]}; "
            f"there are {len(there)} such as {', '.join(likely(unknown[0], there))}"
        )
    entries = {name: plan.entries[name] for name in there if name in plan.entries}
    for group in (graph.group_of[name] for name in plan.modules):
        pattern = plan.modules[group.name]
        own = {group.kind} if group.basis is not None else set()
        if pattern != Structured(0.0, 0.0) and set(pattern.directions) != own:
            use = f"{group.kind}:RANK" if own else "structured:RATIO"
            raise UserError(f"{what}: {pattern} does not go with {group.name}; use {use} there")
        units = of_units(plan.pattern)
        if units is not None and group.kind not in units.kinds and pattern != Structured(0.0, 0.0):
            raise UserError(f"{what} has {pattern} for {group.name}, and its pattern {units} names no {group.kind}")
        if own:
            if pattern.directions.get(group.kind, 0) > group.count or pattern.width not in (None, group.count):
                raise UserError(f"{what}: {pattern} does not fit {group.name}, which has {group.count} directions")
            entries[group.name] = pattern.of(group.kind, group.count)
    if both := reading_directions(graph, plan) & plan.weights.keys():
        raise UserError(f"{what} takes single weights of {min(both)}, which is to read directions; leave one out")
    ordered = replace(plan, entries=entries)
    check_fit(graph, ordered)
    return ordered


def _shown(value: object) -> str:
    """A value of any size as a few characters."""
    return repr(value)[:40] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def kinds_of(plan: Plan) -> str:
    """For people: how the patterns of a plan spread."""
    if not plan.entries:
        return f"{len(plan.removed)} stages go"
    cut, weights = parted(plan)
    if weights is not None:
        return f"modules {kinds_of(cut)}; single weights {kinds_of(weights)}" if cut.entries else kinds_of(weights)
    if any(isinstance(pattern, NM) for pattern in plan.entries.values()):
        counts: dict[str, int] = {}
        for pattern in plan.entries.values():
            key = "dense" if pattern.sparsity == 0 else str(pattern)
            counts[key] = counts.get(key, 0) + 1
        return ", ".join(f"{count} x {key}" for key, count in sorted(counts.items()))
    shares = sorted(pattern.sparsity for pattern in plan.entries.values())
    return f"{shares[0]:.1%} to {shares[-1]:.1%}, median {shares[len(shares) // 2]:.1%}"
