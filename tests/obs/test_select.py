import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.obs.pattern import Unstructured
from obsdiff.obs.select import (
    SAMPLE,
    _first_in_order,
    _kth_lowest,
    count_each,
    count_nonzero,
    drop_lowest,
    keep_best_per_row,
)


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([1, 10, 8 * SAMPLE, 8 * SAMPLE + 1, 70_000]),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "heavy", "few values", "constant", "sorted", "periodic"]),
    seed=st.integers(0, 100),
)
def test_drops_exactly_the_lowest(size, share, kind, seed):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    scores = {
        "normal": scores,
        "heavy": scores.pow(9),
        "few values": scores.round(),
        "constant": torch.ones(size),
        "sorted": scores.sort().values,
        "periodic": torch.arange(size) % (size // SAMPLE | 1) + 0.0,  # the strided sample sees one value only
    }[kind]
    count = round(share * size)
    dropped = drop_lowest(scores, count)
    assert int(dropped.sum()) == count
    if 0 < count < size:
        assert float(scores[dropped].max()) <= float(scores[~dropped].min())
    assert torch.equal(_first_in_order(scores, count), dropped)  # what a GPU goes by
    if count:  # what other devices go by finds the same threshold
        assert float(_kth_lowest(scores, count)) == float(scores.sort().values[count - 1])


@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_is_selected_from(dtype, rows):
    scores = torch.rand(rows, 100, requires_grad=True).to(dtype)
    count = 3 * rows * 100 // 7
    dropped = drop_lowest(scores, count)
    assert int(dropped.sum()) == count and dropped.shape == (rows, 100)
    scores = scores.detach()
    assert float(scores[dropped].max()) <= float(scores[~dropped].min())


def test_what_is_no_number_goes_last():
    scores = torch.rand(30_000)
    scores[::3] = float("nan")
    dropped = drop_lowest(scores, 15_000)
    assert int(dropped.sum()) == 15_000 and bool(scores[dropped].isfinite().all())
    assert float(scores[dropped].max()) <= float(scores[~dropped][scores[~dropped].isfinite()].min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_entries_that_are_not_zero_are_counted(dtype):
    values = torch.tensor([[0.0, -0.0, 1e-30], [2.0, float("nan"), 0.0]]).to(dtype)
    assert count_nonzero(values) == count_nonzero(values.T) == 3
    assert count_nonzero(torch.nn.Parameter(torch.ones(3))) == 3


def test_masks_are_counted_each():
    masks = [torch.tensor([True, False]), torch.tensor([[True], [True]]), torch.tensor([False])]
    assert count_each(masks) == [1, 2, 0]


@pytest.mark.parametrize("columns", [10, 37])
def test_rows_give_up_the_same_share(columns):
    kept = keep_best_per_row(torch.rand(13, columns), Unstructured(0.3))
    counts = (~kept).sum(1)
    assert int(counts.sum()) == round(13 * columns * 0.3) and int(counts.max() - counts.min()) <= 1
