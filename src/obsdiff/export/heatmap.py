"""A plan as a picture: the share removed by layer and block."""

from __future__ import annotations

from pathlib import Path

from obsdiff.models.wiring import WiredGroups, Wiring
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.plan import Plan, kept_groups


def ratio_table(wiring: Wiring, plan: Plan) -> tuple[list[str], list[list[float | None]]]:
    """Names within a block in the order of a forward pass, and per name and block the share removed.

    None where a block has no such layer, or the plan leaves it out.
    """
    modules = {groups.name: groups for groups in wiring.groups}
    blocks = {name: groups.block for name, groups in modules.items()}
    if not plan.structured:
        blocks = {layer: site.block for layer, site in wiring.site_of.items()}
    names = list(dict.fromkeys(_short(wiring, name, block) for name, block in blocks.items()))
    table: list[list[float | None]] = [[None] * wiring.num_blocks for _ in names]
    for name, pattern in plan.entries.items():
        share = _removed(pattern, modules[name]) if plan.structured else pattern.sparsity
        table[names.index(_short(wiring, name, blocks[name]))][blocks[name]] = share
    return names, table


def _short(wiring: Wiring, name: str, block: int) -> str:
    return name.removeprefix(f"{wiring.family.blocks}.{block}.")


def _removed(pattern: Pattern, groups: WiredGroups) -> float:
    assert isinstance(pattern, Structured)
    return 1 - kept_groups(groups, pattern) / groups.count


def draw_ratios(path: Path, wiring: Wiring, plan: Plan, title: str) -> None:
    """A heat map of :func:`ratio_table`, with the percentages written in where they fit."""
    from matplotlib.figure import Figure

    names, table = ratio_table(wiring, plan)
    columns = wiring.num_blocks
    figure = Figure(figsize=(2.8 + 0.5 * columns, 1.4 + 0.3 * len(names)), dpi=110, layout="constrained")
    axis = figure.subplots()
    values = [[float("nan") if value is None else 100 * value for value in row] for row in table]
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(columns), [str(block) for block in range(columns)])
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("block")
    for row, found in enumerate(table):
        for column, value in enumerate(found):
            if value is not None and columns <= 24:
                color = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axis, label="% removed")
    axis.set_title(title, fontsize=9)
    figure.savefig(path, format="png")
