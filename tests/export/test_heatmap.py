"""The picture of a plan."""

import obsdiff
from obsdiff.export.heatmap import draw_ratios, ratio_table
from obsdiff.models.subject import graph_of, subject_of
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import Plan


def test_the_table_has_a_row_per_layer_and_a_column_per_block(pipe, tmp_path):
    graph = subject_of(pipe).graph
    removed = {"transformer_blocks.1.attn.to_k": 0.25}
    names, table = ratio_table(graph, removed)
    assert len(names) == 12 and all(len(row) == 3 for row in table)
    assert table[names.index("attn.to_k")] == [None, 0.25, None]
    draw_ratios(tmp_path / "r.png", graph, removed, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_structured_rows_are_modules_before_and_after_pruning(pipe):
    """What really went: of 64 neurons 30 % would be 45 to stay, 48 is the next multiple of 8."""
    plan = Plan(Structured(0.5, 0.5), {"transformer_blocks.0.ff": Structured(0, 0.3), "transformer_blocks.2.attn":
                Structured(0.5, 0)})  # fmt: skip
    removed = obsdiff.prune(pipe, plan, method="magnitude").sparsity_per_layer
    names, table = ratio_table(subject_of(pipe).graph, removed)
    assert names == ["attn", "ff", "ff_context"]
    assert table == [[None, None, 0.5], [0.25, None, None], [None, None, None]]


def test_directions_that_all_blocks_read_are_left_out_of_a_cut_denoiser_too(pipe, prompts):
    """Looked at without its pipeline, as the export of a recovery does, their layers are like any others."""
    found = obsdiff.calibrate(pipe, prompts[:2])
    removed = obsdiff.prune(pipe, "structured:0.25+rank:4", statistics=found, spare_blocks=[]).sparsity_per_layer
    assert "transformer_blocks.0.norm1.linear" in removed
    names, table = ratio_table(graph_of(pipe.transformer), removed)
    assert names == ["attn", "ff", "ff_context"]
    assert table[0] == [removed[f"transformer_blocks.{block}.attn"] for block in range(3)]
