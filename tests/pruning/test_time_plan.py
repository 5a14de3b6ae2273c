"""How long a prune will take, on one process and on several."""

import pytest

from obsdiff import ranks
from obsdiff.pruning.memory_shapes import Batches, Shapes, SiteShape, Solving
from obsdiff.pruning.time_plan import Amount, Speed, in_rounds, largest_share, time_plan

SITES = tuple(SiteShape(name, columns, (50,), tokens=7) for name, columns in (("a", 100), ("b", 400), ("c", 100)))
SHAPES = Shapes({"transformer": 60_000}, 4, SITES, 700, 900, 5_000, 300, 2_000, 40, 12)
SOLVING = Solving("obs", True, True, centred=True)
AMOUNT, SPEED = Amount(10, 3, 0), Speed(1e9, 1e6, 20)


def planned(processes, packages=(("a", "b", "c"),)):
    return time_plan(SHAPES, SOLVING, Batches(2, 4, packages), SPEED, AMOUNT, processes)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize(("count", "batch"), [(10, 2), (9, 2), (1, 4), (100, 4)])
def test_the_largest_share_is_that_of_the_processes(monkeypatch, processes, count, batch):
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    shares = []
    for own in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda own=own: own)
        part = ranks.own_share(count, batch)
        shares.append(-(-(part.stop - part.start) // batch))
    assert largest_share(count, batch, processes) == max(shares) / sum(shares)
    assert largest_share(0, batch, processes) == 1


def test_rounds_cost_what_their_dearest_does():
    assert in_rounds([1, 5, 2, 4, 3], 1) == 15
    assert in_rounds([1, 5, 2, 4, 3], 2) == 5 + 3 + 1
    assert in_rounds([1, 5, 2], 8) == 5 and in_rounds([], 4) == 0


def test_several_processes_share_the_work():
    one, two, many = planned(1), planned(2), planned(64)
    assert two.calibrate_s == pytest.approx(one.calibrate_s * 3 / 5)  # of five batches three
    assert many.calibrate_s == pytest.approx(one.calibrate_s / 5)
    dear, cheap = (planned(1, ((name,),)).solve_s for name in "ba")
    assert one.solve_s == pytest.approx(dear + 2 * cheap) and two.solve_s == pytest.approx(dear + cheap)
    assert many.solve_s == pytest.approx(dear)
    staged = planned(64, (("a",), ("b", "c")))
    assert staged.solve_s == pytest.approx(cheap + dear)  # stages wait for each other


def test_images_are_dealt_out_one_by_one():
    drawing = [
        time_plan(SHAPES, SOLVING, Batches(2, 8, ((),)), SPEED, Amount(10, 3, 8), processes).draw_s
        for processes in (1, 4, 64)
    ]
    assert drawing[0] > 3 * drawing[1] and drawing[1] > drawing[2] > 0


def test_what_torchrun_started(monkeypatch):
    assert ranks.started_processes() == 1 and ranks.started_first()
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "3")
    assert ranks.started_processes() == 64 and not ranks.started_first()
    monkeypatch.delenv("WORLD_SIZE")  # RANK alone is somebody else's
    assert ranks.started_first()
