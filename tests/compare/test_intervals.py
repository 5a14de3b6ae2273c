"""Bootstrap over seeds, then images, against a loop; and lines of a table against figures worked out by hand."""

import pytest
import torch

from obsdiff.compare.intervals import DRAWS, mean_interval, ratio_interval
from obsdiff.compare.table import lines_of


def by_hand(tables, seed=0):
    """Means of each table over the same draws, one at a time."""
    seeds, images = len(tables[0]), len(tables[0][0])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(seeds, (DRAWS, seeds), generator=generator).tolist()
    within = torch.randint(images, (DRAWS, seeds, images), generator=generator).tolist()
    for draw in range(DRAWS):
        yield [
            sum(float(table[s][i]) for s, own in zip(chosen[draw], within[draw], strict=True) for i in own)
            / (seeds * images)
            for table in tables
        ]


def quantiles(values):
    return torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()).tolist()


def test_intervals_are_those_of_a_loop():
    torch.manual_seed(0)
    values, others = [torch.rand(2, 7, dtype=torch.float64) for _ in range(2)]
    drawn = list(by_hand([values, others]))
    mean, ratio = mean_interval(list(values)), ratio_interval(list(values), list(others))
    assert mean.value == pytest.approx(float(values.mean()))
    assert [mean.low, mean.high] == pytest.approx(quantiles([above for above, _ in drawn]))
    assert ratio.value == pytest.approx(float(values.mean() / others.mean()))
    assert [ratio.low, ratio.high] == pytest.approx(quantiles([above / below for above, below in drawn]))


def test_pairs_tell_apart_what_single_intervals_do_not():
    """Images differ by orders of magnitude, and one method is 10 % worse on every one of them."""
    torch.manual_seed(0)
    values = [10 ** torch.randn(50, dtype=torch.float64) for _ in range(3)]
    worse = [1.1 * each for each in values]
    ratio = ratio_interval(worse, values)
    assert ratio.low == pytest.approx(1.1) and ratio.high == pytest.approx(1.1) and ratio.excludes(1)
    assert mean_interval(worse).low < mean_interval(values).value < mean_interval(worse).high


def test_no_ratio_to_nothing():
    assert ratio_interval([torch.ones(3)], [torch.zeros(3)]) is None


def row(method, seed, mse, hits=(1.0, 0.0), frechet=2.0, error=None, **more):
    return {
        "method": method, "pattern": "2:4", "allocation": "uniform", "recipe": "one shot", "seed": seed, "error": error,
        "variant": "",
        "per_image": {"mse": mse, "alignment": list(hits)}, "evaluation": {"pruned": {"frechet": frechet}},
        "costs": {
            "solving": {"denoiser_flops": 5.0, "wall_s": 1.0}, "calibration": {"denoiser_flops": 1.0, "wall_s": 2.0},
        },
        **more,
    }  # fmt: skip


def test_lines_pair_what_has_the_same_seed():
    rows = [
        row("obs", 0, [1.0, 3.0]),
        row("obs", 1, [2.0, 2.0], frechet=4.0),
        row("wanda", 1, [4.0, 4.0], frechet=1.0),
        row("wanda", 0, None, error="out of memory"),
    ]
    obs, wanda = lines_of(rows, ("method", "obs"))
    assert obs.ratio is None and obs.mse.value == 2.0 and obs.alignment.value == 0.5
    assert (obs.frechet.value, obs.frechet.low, obs.frechet.high) == (3.0, 2.0, 4.0)  # over seeds alone
    assert wanda.frechet.low == wanda.frechet.value == wanda.frechet.high == 1.0
    assert len(wanda.rows) == 1 and wanda.ratio.value == 2.0 and wanda.ratio.low == 2.0
    assert wanda.flops == 6.0 and wanda.wall_s == 3.0
    assert "Fréchet" in wanda.remark and obs.remark == ""


def test_variants_are_compared_with_the_first_of_the_same_method():
    rows = [
        row(method, 0, [factor * scale] * 2, variant=variant)
        for method, scale in (("obs", 1.0), ("wanda", 8.0))
        for variant, factor in (("usual", 1.0), ("late", 3.0))
    ]
    found = {(line.method, line.variant): line.ratio for line in lines_of(rows, ("variant", "usual"))}
    assert found["obs", "usual"] is None and found["wanda", "usual"] is None
    assert found["obs", "late"].value == found["wanda", "late"].value == 3.0


def test_an_image_that_is_not_finite_leaves_no_figure():
    [line] = lines_of([row("obs", 0, [1.0, None])], ("method", "obs"))
    assert line.mse is None and line.ratio is None and line.alignment.value == 0.5
