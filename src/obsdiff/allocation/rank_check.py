"""What ranks leave out, on prompts that were not calibrated on, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obsdiff.data.prompts import load_prompts
from obsdiff.models.info import info_of
from obsdiff.models.subject import Subject
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.plan import Plan, kept_units, loses
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.vectors import checked_rank

HELD_OUT = 16  # prompts of the other set on which ranks are tried
WORSE, NOTED = 4.0, 1e-3  # a note is due where they lose this many times as much, and that is no trifle


def checked_ranks(
    subject: Subject, plan: Plan, found: Any, options: PruningOptions, prompts: Sequence[str], quiet: bool
) -> dict[str, dict[str, Any]]:
    """What the ranks of a plan leave out of vectors and tokens, on the calibration's prompts and on some of the
    pipeline's other set."""
    graph = subject.graph
    cut = plan.groups(graph) if plan.structured else []
    groups = [group for group in cut if group.basis is not None and loses(group, plan.modules[group.name])]
    if not groups:
        return {}
    sites = {group.layers[0] for group in groups}
    settings, source = options.calibration, info_of(subject.pipe).prompts.get("evaluation")
    own = found if isinstance(found, Statistics) else found(sites)
    others = None
    if source is not None and (unseen := [text for text in load_prompts(source) if text not in set(prompts)]):
        some = unseen[:: max(1, len(unseen) // HELD_OUT)][:HELD_OUT]
        given: Any = {name: getattr(settings, name) for name in ("steps", "guidance_scale", "tokens", "batch_size")}
        given |= {"weighting": own.fingerprint["weighting"], "seed": options.seed + 1}
        others = calibrate(subject, some, **given, sites=sites, quiet=quiet)
    checked = {}
    for group in groups:
        rank, device = kept_units(group, plan.modules[group.name]), graph.weight(group.name).device
        sets = [None if s is None else s.site(group.name, device) for s in (own, others)]
        checked[group.name] = checked_rank(graph, group, rank, *sets)  # type: ignore[arg-type]  # own is there
    return checked


def rank_notes(ranks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For people: ranks that serve other prompts worse, or that were tried on none."""
    notes = []
    if ranks and all("error_held_out" not in found for found in ranks.values()):
        notes.append(f"{len(ranks)} ranks were tried on no other prompts: this pipeline names no set of them")
    for name, found in ranks.items():
        what = f"rank {found['rank']:g} of {found['width']:g} at {name}"
        error, other = found["error"], found.get("error_held_out", 0.0)
        if other > WORSE * error and other > NOTED:
            notes.append(
                f"{what} loses {other:.2g} of its layers' output with prompts that were not calibrated on, {error:.2g} "
                "with those that were; calibrate on more prompts, or keep a higher rank"
            )
    return notes
