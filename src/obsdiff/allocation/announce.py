"""What the one-shot stage is about to do, for people: layers, passes, memory."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from obsdiff.allocation.clock import PROCESS_S
from obsdiff.allocation.depth import describe_depth
from obsdiff.allocation.planning import allocates, depth_of, describe_scan, needs_for, packages_for, rule_of
from obsdiff.allocation.stage import measures, weighting_of
from obsdiff.models.denoisers import device_of
from obsdiff.models.graph import Graph, Site
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.subject import Subject
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.observers import GATES, PASSES, gradient_for, observer_for, sums_held
from obsdiff.pruning.defaults import departures
from obsdiff.pruning.describe import describe, remarks
from obsdiff.pruning.gates import STEPS, gated_groups
from obsdiff.pruning.gradients import TIMES, layers_of
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.plan import Plan, packages_of
from obsdiff.pruning.planfile import kinds_of


def announce(subject: Subject, plan: Plan, options: PruningOptions, num_prompts: int, statistics: Path | None) -> None:
    """Say on standard error what is about to happen: layers, passes, memory."""
    pipe, graph = subject.pipe, subject.graph
    if plan.removed or depth_of(options) is not None:
        print(f"{info_of(pipe).source}: {describe_depth(subject, plan, options, num_prompts)}", file=sys.stderr)
    if not plan.entries:
        return
    sites = plan.sites(graph)
    chosen = [site for site in (*graph.vectors, *graph.sites) if statistics is not None or site.name in sites]
    what = describe(plan.pattern)
    if allocates(options):
        what = f"{rule_of(options)} allocation, budget {options.budget or f'as uniform {plan.pattern}'}"
    elif options.plan is not None:
        what = f"plan {options.plan}, {kinds_of(plan)}"
    lines = [
        f"{info_of(pipe).source}: {what}; {len(plan.entries)} {'modules' if plan.structured else 'layers'}, "
        f"{len(sites)} distinct inputs, method {options.method}",
        *remarks(graph, plan),
    ]
    settings = options.calibration
    call = call_arguments(pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    steps = int(call.get("num_inference_steps") or 1)
    if measures(options, statistics):
        passes = len(packages_of(graph, plan, packages_for(options, statistics)))
        how = f"{passes} pass{'es' if passes > 1 else ''}"
        if settings.streamed:
            passes, how = len({site.stage for site in chosen}), "stage by stage"
        lines.append(
            f"calibration: {num_prompts} prompts x {steps} steps, guidance {call.get('guidance_scale')}, {how}; "
            + _memory(graph, chosen, needs_for(options, statistics), passes)
            + ("" if settings.precision is None else f", products in {settings.precision}")
        )
        lines += departures(options.method, {"weighting": weighting_of(options, statistics)}, passes)
    if rule_of(options) == "measured":
        lines.append(describe_scan(graph, plan, options, num_prompts, steps))
    if (options.budget or "").startswith("latency:"):
        lines.append(
            f"latency: a new process times the dense and the shrunk denoiser for {PROCESS_S:g} s, and another one if "
            "the choice is corrected"
        )
    print("\n".join(lines), file=sys.stderr)


def _memory(graph: Graph, sites: Sequence[Site], needs: Collection[str], passes: int) -> str:
    """For people: what a calibration holds."""
    numbers = [weight_matrices(graph.layer(site.name)).shape for site in sites]
    whole = "gram" in needs
    observer, device = observer_for(needs), device_of(graph.denoiser)
    hessians = 4 * sum(sums_held(observer, columns, groups, device.type) for groups, _, columns in numbers)
    held = {} if needs and set(needs) <= PASSES else {"Hessians" if whole else "diagonals of Hessians": hessians}
    if gradient_for(needs) is not None:
        layers = layers_of(graph, [site for site in sites if site not in graph.vectors])
        held[f"gradients of the loss at {TIMES} times"] = 4 * sum(graph.weight(layer).numel() for layer in layers)
    if GATES in needs:
        units = sum(group.count for group in gated_groups(graph, sites))
        held[f"gates, learned in {STEPS} steps,"] = 16 * units  # λ, its gradient and the optimizer's two moments
    return ", ".join(f"{what} take {size / passes / 2**20:,.0f} MiB" for what, size in held.items())
