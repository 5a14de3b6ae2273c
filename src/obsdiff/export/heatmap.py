"""What was pruned as a picture: the share removed by layer and block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from obsdiff.models.graph import Graph


def ratio_table(graph: Graph, removed: Mapping[str, float]) -> tuple[list[str], list[list[float | None]]]:
    """Names within a block in the order of a forward pass, and per name and block the share removed.

    None where a block has no such layer, or it was left alone.

    Args:
        graph: Of the dense or of the pruned denoiser.
        removed: Share removed by layer, or by attention and feed-forward module. What is of no single block, such as
            directions of a vector that all of them read, is left out.
    """
    blocks: Mapping[str, int] = {group.name: group.stage for group in graph.groups if group.basis is None}
    if not removed.keys() & blocks.keys():
        blocks = graph.layers
    removed = {name: share for name, share in removed.items() if name in blocks}

    def short(name: str) -> str:
        stage = graph.stages[blocks[name]]
        return name.removeprefix(f"{stage}.") if name != stage else name.rpartition(".")[0].rpartition(".")[2]

    names = list(dict.fromkeys(map(short, blocks)))
    table: list[list[float | None]] = [[None] * len(graph.stages) for _ in names]
    for name, share in removed.items():
        table[names.index(short(name))][blocks[name]] = share
    return names, table


def draw_ratios(path: Path, graph: Graph, removed: Mapping[str, float], title: str) -> None:
    """A heat map of :func:`ratio_table`, with the percentages written in where they fit."""
    from matplotlib.figure import Figure

    names, table = ratio_table(graph, removed)
    columns = len(graph.stages)
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
