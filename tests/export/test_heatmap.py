"""The picture of a plan."""

from obsdiff.export.heatmap import draw_ratios, ratio_table
from obsdiff.models.wiring import wire
from obsdiff.obs.pattern import Structured, Unstructured
from obsdiff.pruning.plan import Plan


def test_the_table_has_a_row_per_layer_and_a_column_per_block(pipe, tmp_path):
    wiring = wire(pipe.transformer)
    plan = Plan(Unstructured(0.5), {"transformer_blocks.1.attn.to_k": Unstructured(0.25)})
    names, table = ratio_table(wiring, plan)
    assert len(names) == 12 and all(len(row) == 3 for row in table)
    assert table[names.index("attn.to_k")] == [None, 0.25, None]
    draw_ratios(tmp_path / "r.png", wiring, plan, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_structured_rows_are_modules_and_say_what_really_goes(pipe):
    plan = Plan(Structured(0.5, 0.5), {"transformer_blocks.0.ff": Structured(0, 0.3), "transformer_blocks.2.attn":
                Structured(0.5, 0)})  # fmt: skip
    names, table = ratio_table(wire(pipe.transformer), plan)
    assert names == ["attn", "ff", "ff_context"]
    assert table == [[None, None, 0.5], [0.25, None, None], [None, None, None]]  # 48 of 64 neurons stay
