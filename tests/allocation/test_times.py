"""A search by the clock that is killed goes on from what it measured; other machines' times are not used."""

import json

import pytest
import torch

import obsdiff
from obsdiff.allocation.allocate import allocate
from obsdiff.allocation.times import FILE, Times, open_times
from obsdiff.pruning.options import ScanOptions
from tests.allocation.test_allocate import PROMPTS, count_parameters, written_parameters
from tests.conftest import make_pipe


@pytest.fixture(scope="module")
def statistics():
    return obsdiff.calibrate(make_pipe(), PROMPTS)


def search(statistics, store, clock=count_parameters, most=1000):
    """With processes that differ by 0.5 %, of which after ``most`` the search is killed; also how many there were."""
    kept, trials = store.parent / "trials.json", 0

    def trial(folder):
        nonlocal trials
        seed = json.loads(kept.read_text()) if kept.exists() else 0
        if trials == most:
            raise KeyboardInterrupt
        trials += 1
        kept.write_text(json.dumps(seed + 1))
        dense, smaller = written_parameters(folder, 20_000)
        return dense, smaller * (1 + 0.005 * float(torch.randn((), generator=torch.Generator().manual_seed(seed))))

    found = allocate(
        make_pipe(), "structured:heads=0.3,ffn=0.3,multiple_of=1", statistics, PROMPTS, budget="latency:0.8",
        scanning=ScanOptions(levels=[0.5, 0.9], triples=4), store=store, clock=clock, trial=trial,
    )  # fmt: skip
    return found, trials


def no_clock(calls):
    raise AssertionError("timed again")


def test_a_killed_search_goes_on_to_the_same_end(statistics, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, trials = search(statistics, tmp_path / "whole" / "store")
    assert trials > 12 and whole.earlier_s == 0
    store = tmp_path / "killed" / "store"
    for most in (7, 4):
        with pytest.raises(KeyboardInterrupt):
            search(statistics, store, count_parameters if most == 7 else no_clock, most)
    found, left = search(statistics, store, no_clock)
    assert left == trials - 11 and found.plan == whole.plan and found.earlier_s > 0
    assert {**found.record, "scan": None} == {**whole.record, "scan": None}
    again, none = search(statistics, store, no_clock)
    assert none == 0 and again.record == found.record and again.earlier_s > found.earlier_s


def test_times_of_another_machine_are_not_used(statistics, tmp_path):
    store = tmp_path / "store"
    _, trials = search(statistics, store)
    content = json.loads((store / FILE).read_text())
    content["fingerprint"]["machine"] = "another"
    (store / FILE).write_text(json.dumps(content))
    assert search(statistics, store)[1] >= 10 and trials >= 10
    content["format"] = 0  # nor those of another version
    (store / FILE).write_text(json.dumps(content))
    assert search(statistics, store)[1] >= 10


def test_a_refused_scan_leaves_no_times(statistics, tmp_path):
    """Nothing is written into the folder of another scan."""
    allocate(
        make_pipe(), "unstructured:0.5", statistics, PROMPTS,
        scanning=ScanOptions(levels=[0.5], triples=2), store=tmp_path,
    )  # fmt: skip
    with pytest.raises(obsdiff.UserError, match="sensitivity scan"):
        search(statistics, tmp_path)
    assert not (tmp_path / FILE).exists()


def test_measurements_come_back_in_their_order(tmp_path):
    layer, values = torch.nn.Linear(2, 2), iter(range(9))
    times = open_times(tmp_path, {"model": "m"}, layer)
    assert [times.measure("a", lambda: [next(values)]) for _ in range(2)] == [[0], [1]]
    times.save()
    times = open_times(tmp_path, {"model": "m"}, layer)
    assert [times.measure(key, lambda: [next(values)]) for key in ("a", "b", "a", "a")] == [[0], [2], [1], [3]]
    assert times.earlier_s > 0
    assert open_times(tmp_path, {"model": "n"}, layer).found == {} == Times().found
    Times().save()  # nowhere
    (tmp_path / FILE).write_text('{"format": 1}')
    with pytest.raises(obsdiff.UserError, match=r"latency.json is damaged: .*; delete it"):
        open_times(tmp_path, {"model": "m"}, layer)
    (tmp_path / "file").write_text("")
    with pytest.raises(obsdiff.UserError, match=r"cannot write .*file"):
        Times(tmp_path / "file").save()
