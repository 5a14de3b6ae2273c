"""The cells of a comparison: what is pruned how, and what is trained after it. Needs no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from obsdiff.allocation.request import (
    check_evaluation,
    check_method,
    check_precision_name,
    check_scan,
    check_values,
)
from obsdiff.compare.options import CompareOptions
from obsdiff.costs import Cost
from obsdiff.errors import UserError
from obsdiff.numbers import check_number, check_seed, check_whole
from obsdiff.pruning.options import EvaluationOptions, PruningOptions, ScanOptions
from obsdiff.yamlfiles import read_yaml

REFIT = "+refit"  # added to a method: what it leaves by least squares
SCRATCH = "+scratch"  # added to a method: the shape it leaves, with weights as before any training
AXES = ("pattern", "budget", "method", "plan", "allocation", "seed")  # what a variant cannot say
ONE_SHOT = "one shot"  # the name of a row that nothing was trained for


@dataclass(frozen=True)
class Unit:
    """What is pruned once; each of its rows is a recovery from there, or none.

    Attributes:
        method, pattern, allocation, variant, seed: As the options name them; the variant is "" where there are none.
        pruning: The whole request.
        evaluation: Its images.
    """

    method: str
    pattern: str
    allocation: str
    variant: str
    seed: int
    pruning: PruningOptions
    evaluation: EvaluationOptions

    @property
    def scratch(self) -> bool:
        """Whether it is trained from new weights."""
        return self.method.endswith(SCRATCH)

    def __str__(self) -> str:
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.pattern} by {self.method}, {self.allocation}{variant}, seed {self.seed}"


@dataclass(frozen=True)
class LeftOut:
    """A combination that cannot be, with the reason."""

    method: str
    pattern: str
    allocation: str
    variant: str
    reason: str


def units_of(options: CompareOptions) -> tuple[list[Unit], list[LeftOut]]:
    """All that is to be pruned, those of one seed and method next to each other, and what cannot be.

    Raises:
        UserError: An option is wrong, or nothing is left to compare.
    """
    check(options)
    units, left_out = [], []
    axes = (options.methods, options.patterns, options.allocations, options.variants or {"": {}})
    for at, seed in enumerate(options.seeds):
        own = options.evaluation
        images = replace(own, seed=own.seed + at * own.num_images)
        for what in itertools.product(*axes):
            pruning = _request(options, *what, seed)
            try:
                _check_together(pruning)
            except UserError as error:
                if at == 0:
                    left_out.append(LeftOut(*what, str(error)))
                continue
            units.append(Unit(*what, seed, pruning, images))
    if not units:
        reasons = "; ".join(dict.fromkeys(found.reason for found in left_out))
        raise UserError(f"no method goes with any of the patterns and allocations: {reasons}")
    return units, left_out


def _request(
    options: CompareOptions, method: str, pattern: str, allocation: str, variant: str, seed: int
) -> PruningOptions:
    text, _, budget = pattern.partition(" ")
    usual = PruningOptions(
        pattern=text,
        budget=budget.strip() or None,
        method=_bare(method),
        refit=True if method.endswith(REFIT) else None,
        allocation=allocation,
        seed=seed,
        calibration=options.calibration,
        scan=options.scan if allocation == "measured" else ScanOptions(),
    )
    return _changed(usual, options.variants[variant], f"variants.{variant}") if variant else usual


def _bare(method: str) -> str:
    """A method without what is added to it, one thing at most."""
    return method.removesuffix(SCRATCH if method.endswith(SCRATCH) else REFIT)


def _changed(options: Any, changes: Any, what: str) -> Any:
    """Options, a dataclass, with some of them replaced, inner ones one by one.

    Raises:
        UserError: There is no such option, or it is an axis of the comparison.
    """
    if not isinstance(changes, Mapping):
        raise UserError(f"{what} is {changes!r}; give options by name, such as {{calibration: {{damping: 0.1}}}}")
    known = [field.name for field in fields(options) if field.name not in AXES]
    if wrong := [name for name in changes if name not in known]:
        raise UserError(f"{what} names {wrong[0]!r}; choose of {', '.join(known)}")
    values = {name: getattr(options, name) for name in changes}
    found = {
        name: _changed(values[name], change, f"{what}.{name}") if is_dataclass(values[name]) else change
        for name, change in changes.items()
    }
    return replace(options, **found)


def _check_together(pruning: PruningOptions) -> None:
    """Refuse a method, a pattern and an allocation that do not go together."""
    from obsdiff.allocation.planning import check_options, packages_for
    from obsdiff.criteria import find_method

    if pruning.refit and find_method(pruning.method).refit:
        raise UserError(f"{pruning.method} refits anyway; leave out {REFIT}")
    check_precision_name("calibration.precision", pruning.calibration.precision)
    if not pruning.calibration.streamed and packages_for(pruning, None) == 1:
        # calibrations are kept, and those that are have whole Hessians for every method
        pruning = replace(pruning, calibration=replace(pruning.calibration, precision=None))
    check_options(pruning)


def check(options: CompareOptions) -> None:
    """Refuse options that are wrong by themselves.

    Raises:
        UserError: Naming the first one.
    """
    for name in ("methods", "patterns", "allocations", "seeds"):
        values = getattr(options, name)
        if not values:
            raise UserError(f"{name} is empty; name at least one")
        if double := [value for at, value in enumerate(values) if value in values[:at]]:
            raise UserError(f"{name} names {double[0]} twice")
    for pattern in options.patterns:
        check_values(_request(options, "obs", pattern, "uniform", "", 0))
    for method in (*options.methods, options.reference):
        check_method(_bare(method))
    for name, other in itertools.combinations(options.variants, 2):
        if options.variants[name] == options.variants[other]:
            raise UserError(f"the variants {name} and {other} say the same; leave one out")
    for variant in options.variants:
        check_values(_request(options, options.methods[0], options.patterns[0], options.allocations[0], variant, 0))
    for allocation in options.allocations:
        check_values(PruningOptions(allocation=allocation))
    check_scan(options.scan)
    if options.scan != ScanOptions() and "measured" not in options.allocations:
        raise UserError("scan options belong to measured allocations, and allocations names none")
    if options.reference not in options.methods:
        raise UserError(f"reference {options.reference} is none of the methods {', '.join(options.methods)}")
    for seed in options.seeds:
        check_seed("seeds", seed)
    check_evaluation(options.evaluation)
    check_whole("evaluation.num_images", options.evaluation.num_images, 2)
    check_whole("jobs", options.jobs, 1, 1000)
    check_whole("shown", options.shown, 0)
    for name, limit in options.budget.items():
        if name not in Cost.__dataclass_fields__:
            raise UserError(f"unknown budget {name!r}; choose one of {', '.join(Cost.__dataclass_fields__)}")
        check_number(f"budget.{name}", limit, 1e-9)
    if options.budget and not options.recipes:
        raise UserError("budget limits recoveries, and recipes names none")
    for name, recipe in options.recipes.items():
        if name == ONE_SHOT:
            raise UserError(f"a recipe cannot be called {ONE_SHOT!r}")
        read_recipe(recipe)
    known: dict[str, str] = {}
    for name, recipe in options.recipes.items():
        same = known.setdefault(json.dumps(_with_content(read_recipe(recipe)), sort_keys=True, default=str), name)
        if same != name:
            raise UserError(f"the recipes {same} and {name} say the same; leave one out")


def read_recipe(path: str) -> dict[str, Any]:
    """The content of a recovery's YAML.

    Raises:
        UserError: It is missing, or no configuration of a recovery.
    """
    if not Path(path).is_file():
        raise UserError(f"recipe {path} not found")
    found = read_yaml(path, "recipe")
    parts = [found.get(key) for key in ("model", "data")]
    if not all(isinstance(part, Mapping) and "." in str(part.get("class_path")) for part in parts):
        raise UserError(
            f"recipe {path} names no classes of model and data (class_path); give one like configs/recover/distill.yaml"
        )
    return found


def part_of(units: Sequence[Unit], part: str | None) -> list[Unit]:
    """The units of one part, "K/N": a stretch of the list, so that parts share few calibrations and scans.

    Raises:
        UserError: There is no such part.
    """
    if part is None:
        return list(units)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"part is {part!r}; it must be K/N with K from 0 to N-1, such as 0/4")
    at, count = int(match[1]), int(match[2])
    return list(units[at * len(units) // count : (at + 1) * len(units) // count])


def key_of(unit: Unit, recipe: str | None, budget: Mapping[str, float], content: Mapping[str, Any]) -> str:
    """What a row is kept by: everything its figures depend on, never a path or a name.

    Args:
        unit: What is pruned.
        recipe: The recovery's YAML, or None.
        budget: Limits of the recovery.
        content: Hashes of the dense pipeline and of the prompts.
    """
    unnamed: dict[str, Any] = {"prompts": None, "column": None, "batch_size": 1}  # the content says which prompts
    calibration = replace(unit.pruning.calibration, **unnamed)
    material: dict[str, Any] = {
        "pruning": _asked(replace(unit.pruning, calibration=calibration)),
        "evaluation": _with_content(_asked(replace(unit.evaluation, **unnamed, real_cache=None)), folders=True),
        "recovery": None if recipe is None else [_with_content(read_recipe(recipe)), dict(budget)],
        "content": content,
    }
    if unit.scratch:  # alone, so that the keys of the others stay as they are
        material["scratch"] = True
    return hashlib.sha256(json.dumps(material, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _asked(options: Any) -> dict[str, Any]:
    """What differs from the defaults, so that an option which comes new changes no key."""
    found, default = {}, type(options)()
    for field in fields(options):
        value, usual = getattr(options, field.name), getattr(default, field.name)
        if value != usual:
            found[field.name] = _asked(value) if is_dataclass(value) else value
    return found


def _with_content(node: Any, folders: bool = False) -> Any:
    """The same configuration with a hash in place of the name of every file, and if asked folder, that it names."""
    if isinstance(node, Mapping):
        return {key: _with_content(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_content(value, folders) for value in node]
    if isinstance(node, str):
        path = Path(node).expanduser()
        if path.is_file():
            return _hash(path)
        if folders and path.is_dir():
            return _folder_hash(path.absolute())
    return node


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _folder_hash(folder: Path) -> str:
    """Of all files below a folder and their names; taken once, since they may be many and a comparison changes none."""
    inside = {str(file.relative_to(folder)): _hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()
