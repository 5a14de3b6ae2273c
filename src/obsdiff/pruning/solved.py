"""What a prune has solved so far (:mod:`obsdiff.pruning.kept`): of each site and each set of groups the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.files import remove_folder
from obsdiff.models.graph import Graph, Group, Site
from obsdiff.pruning.kept import KeptParts, check_kept
from obsdiff.pruning.layers import LayerResult, SolveOptions
from obsdiff.pruning.plan import Plan, cut_bundles, masked_sites

INDEX = "solved.json"
TENSORS = ("weight", "mask", "bias_shift", "basis")  # of a layer's result
Results = tuple[dict[str, Tensor], dict[str, LayerResult]]
"""Of one solve: bool (count,) by group, True = kept, and the layers' results."""


def check_solved(folder: Path) -> None:
    """Refuse a place for results that holds something else, or cannot be written.

    Raises:
        UserError: Naming it.
    """
    check_kept(folder, INDEX, "layers that a prune has solved")


def remove_solved(folder: Path) -> None:
    """Remove what was kept: the run that it was for is written."""
    remove_folder(folder, INDEX)


def part_of(item: Site | list[Group]) -> str:
    """The name that a solve is kept by."""
    return f"weights of {item.name}" if isinstance(item, Site) else f"units of {item[0].name}"


class Solved:
    """Results of solves.

    Args:
        folder: Where.
        graph, plan, options: What is solved, and how.
        measured: Fingerprint of the statistics, with the model's hash.
        way: Whatever else they depend on, such as which layers were pruned while others were measured.
    """

    def __init__(
        self, folder: Path, graph: Graph, plan: Plan, options: SolveOptions, measured: Mapping[str, Any], way: Any
    ) -> None:
        entries = {name: str(pattern) for name, pattern in plan.entries.items()}
        known = [measured, entries, sorted(plan.dead), asdict(options), way]
        key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        self._graph, self._plan = graph, plan
        self._parts = KeptParts(folder, INDEX, key, self._names(None))

    def _names(self, package: Collection[str] | None) -> list[str]:
        bundles = cut_bundles(self._graph, self._plan, package)
        return [*map(part_of, bundles), *map(part_of, masked_sites(self._graph, self._plan, package))]

    def __len__(self) -> int:
        """How many were there at the start."""
        return len(self._parts)

    def holds(self, package: Collection[str]) -> bool:
        """Whether everything was there that a package of sites is measured for."""
        return all(name in self._parts for name in self._names(package))

    def __contains__(self, item: Site | list[Group]) -> bool:
        """Whether it was there at the start."""
        return part_of(item) in self._parts

    def load(self, item: Site | list[Group]) -> Results:
        """What was solved."""
        said, tensors = self._parts.read(part_of(item))
        told = json.loads(said["told"])
        units = {group: tensors[f"units/{group}"] for group in told["units"]}
        layers = {
            layer: LayerResult(
                **{kind: tensors.get(f"{kind}/{layer}") for kind in TENSORS},  # type: ignore[arg-type]
                error=error,
                refit_steps=steps,
            )
            for layer, (error, steps) in told["layers"].items()
        }
        return units, layers

    def save(self, item: Site | list[Group], results: Results) -> None:
        """Keep what was solved.

        Raises:
            UserError: It cannot be written.
        """
        units, layers = results
        tensors = {f"units/{group}": kept for group, kept in units.items()}
        for layer, result in layers.items():
            for kind in TENSORS:
                if (tensor := getattr(result, kind)) is not None:
                    tensors[f"{kind}/{layer}"] = tensor
        said = {"units": list(units), "layers": {name: [r.error, r.refit_steps] for name, r in layers.items()}}
        self._parts.write(part_of(item), tensors, {"told": json.dumps(said)})
