"""Budgets in latency: the table chooses, a new process measures, one correction; and what was timed is kept."""

import json
import warnings

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import obsdiff
from obsdiff.allocation import clock, latency
from obsdiff.allocation.allocate import allocate
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import PruningOptions
from tests.conftest import make_pipe

PROMPTS = ["the digit two", "a seven"]
PATTERN = "structured:heads=0.3,ffn=0.3,multiple_of=1"


@pytest.fixture(scope="module")
def statistics():
    return obsdiff.calibrate(make_pipe(), PROMPTS)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


class Clocks:
    """Stand-ins that take a microsecond per parameter, and in a new process some more that never goes.

    Args:
        fixed: That much more.
        table: Factor of what modules alone take.
        noise: Standard deviation of rounds in a new process, relative, not the same for dense and smaller.
    """

    def __init__(self, fixed=0, table=1.0, noise=0.0, seed=0):
        self.fixed, self.table, self.noise = fixed, table, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.dense = count(make_pipe().transformer) + fixed
        self.calls, self.shares = 0, []

    def time_calls(self, calls):
        self.calls += len(calls)
        return [1e-6 * self._of(call) for call in calls]

    def _of(self, call):
        ran = {}

        def note(module, args, output):
            ran.update({id(parameter): parameter.numel() for parameter in module.parameters(recurse=False)})

        with register_module_forward_hook(note):
            call()
        own = sum(ran.values())
        return own + self.fixed if own + self.fixed >= 0.9 * self.dense else self.table * own

    def time_in_new_process(self, dense, smaller, arguments):
        seconds = torch.tensor([count(dense) + self.fixed, count(smaller) + self.fixed], dtype=torch.float64)
        self.shares.append(float(seconds[1] / seconds[0]))
        spread = self.noise * torch.randn(100, 2, generator=self.generator, dtype=torch.float64)
        return (1e-6 * seconds * (1 + spread)).tolist()


@pytest.fixture
def clocks(monkeypatch):
    def use(**options):
        made = Clocks(**options)
        monkeypatch.setattr(latency, "time_calls", made.time_calls)
        monkeypatch.setattr(latency, "time_in_new_process", made.time_in_new_process)
        return made

    return use


def chosen(statistics, budget, rule="uniform", **options):
    asked = PruningOptions(pattern=PATTERN, allocation=rule, budget=budget, spare_blocks=[])
    return allocate(make_pipe(), asked, statistics, PROMPTS, **options)


def true_share(plan, statistics, fixed):
    pipe = make_pipe()
    dense = count(pipe.transformer) + fixed
    obsdiff.prune(pipe, plan, statistics=statistics)
    return (count(pipe.transformer) + fixed) / dense


def test_an_exact_table_needs_one_measurement(statistics, clocks, capsys):
    used = clocks(fixed=2000)
    found = chosen(statistics, "latency:0.7", quiet=False)
    share = true_share(found.plan, statistics, 2000)
    assert 0.99 * 0.7 <= share <= 0.7 and used.shares == [pytest.approx(share)]
    assert found.record["achieved"] == pytest.approx(share)
    assert found.record["achieved_interval"] == pytest.approx([share, share])
    assert f"latency:0.7: {share:.4f} ({share:.4f} to {share:.4f}) of the dense time" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["uniform", "owl"])
@pytest.mark.parametrize("table", [0.9, 1.1])
def test_one_correction_makes_good_for_a_table_that_is_wrong_by_a_tenth(statistics, clocks, rule, table):
    used = clocks(table=table, fixed=1000)
    found = chosen(statistics, "latency:0.7", rule=rule)
    first, second = used.shares
    assert first - 0.7 == pytest.approx(0.3 * (1 - 1 / table), abs=0.008)  # savings are off by a tenth
    assert second == pytest.approx(0.7, abs=0.007) and abs(second - 0.7) < abs(first - 0.7)
    assert found.record["achieved"] == pytest.approx(second)
    assert true_share(found.plan, statistics, 1000) == pytest.approx(second)


@pytest.mark.parametrize("seed", range(4))
def test_noisy_rounds_still_come_within_three_percent(statistics, clocks, seed):
    """Rounds differ by 4 %; and modules alone save 1.5 times what they save in the whole."""
    used = clocks(table=1.5, noise=0.04, seed=seed)
    found = chosen(statistics, "latency:0.8")
    share, (low, high) = true_share(found.plan, statistics, 0), found.record["achieved_interval"]
    assert len(used.shares) == 2 and abs(share / 0.8 - 1) < 0.03
    assert low < found.record["achieved"] < high and high - low < 0.04
    assert low - 0.01 < share < high + 0.01


def test_a_budget_that_is_missed_is_warned_of(statistics, clocks):
    """Where modules are a small part of the time, a doubled saving is not enough."""
    used = clocks(table=20.0, fixed=500)
    with pytest.warns(UserWarning, match=r"latency:0.8 came to 0.9\d+ of the dense time; ask for another share"):
        found = chosen(statistics, "latency:0.8")
    assert found.record["achieved"] == pytest.approx(min(used.shares)) and len(used.shares) == 2


def test_the_whole_time_may_stay(statistics, clocks):
    used = clocks(noise=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = chosen(statistics, "latency:1")
    assert used.shares == [1.0] and found.record["achieved"] == pytest.approx(1.0, abs=1e-3)


def test_the_interval_covers_the_ratio():
    """Of 200 samples of 40 rounds the 95 % interval misses the ratio of the true medians in about 10."""
    generator, misses = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        rounds = (1 + 0.05 * torch.randn(40, 2, generator=generator)) * torch.tensor([1.0, 0.8])
        share, low, high = latency.share_of(rounds.tolist())
        assert low <= share <= high
        misses += not low <= 0.8 <= high
    assert 2 <= misses <= 24
    assert latency.share_of([[2.0, 1.0]] * 5) == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_times_are_kept_for_this_machine_and_model(statistics, clocks, tmp_path, monkeypatch):
    def search():
        used = clocks(table=1.1)
        return chosen(statistics, "latency:0.7", store=tmp_path), used.calls, len(used.shares)

    first, calls, processes = search()
    assert calls > 0 and processes == 2
    again, *measured = search()
    assert measured == [0, 0] and again.plan == first.plan and again.record == first.record
    monkeypatch.setattr(latency.platform, "node", lambda: "another")
    assert search()[1:] == (calls, 2)
    monkeypatch.setattr(latency, "component_hash", lambda model: "another")
    assert search()[1:] == (calls, 2)
    for damaged in ("{", "[]", '{"times": {"x": "y"}}', '{"times": {"x": [[1.0, "a"]]}}'):
        (tmp_path / latency.FILE).write_text(damaged)
        with pytest.raises(obsdiff.UserError, match=r"latency.json is not times of denoisers"):
            search()


def test_a_full_disk_is_one_line(statistics, clocks, monkeypatch):
    clocks()
    monkeypatch.setattr(latency, "time_in_new_process", clock.time_in_new_process)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clock, "save_file", full)
    with pytest.raises(obsdiff.UserError, match=r"cannot write the denoisers .*No space left on device; set TMPDIR"):
        chosen(statistics, "latency:0.9")


def test_a_call_that_another_call_has_slowed_down_is_not_counted(monkeypatch):
    """Each call costs 7 ms more right after the other; sampling repeats one of them."""
    now, last = 0.0, None

    def call(name, seconds):
        nonlocal now, last
        now, last = now + seconds + 0.007 * (last != name), name

    monkeypatch.setattr(clock.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(clock.time, "thread_time", lambda: now)
    found = clock.time_calls([lambda: call("dense", 0.008), lambda: call("shrunk", 0.006), lambda: call("slow", 9.0)])
    assert found == pytest.approx([0.008, 0.006, 9.0])


@pytest.mark.slow
def test_a_new_process_loads_both_denoisers(monkeypatch):
    """Also what was shrunk before; and its failures are one line."""
    monkeypatch.setattr(clock, "PROCESS_S", 0.5)
    pipe, dense = make_pipe(), make_pipe()
    obsdiff.prune(pipe, "structured:0.3", statistics=obsdiff.calibrate(pipe, PROMPTS))
    timing = latency.timing_of(dense, subject_of(dense).graph, call_arguments(dense), None)
    rounds = clock.time_in_new_process(dense.transformer, pipe.transformer, timing.arguments)
    assert len(rounds) >= clock.LEAST_ROUNDS and 0.1 < latency.share_of(rounds)[0] < 2
    monkeypatch.setattr(pipe.transformer, "save_pretrained", lambda folder: None)
    with pytest.raises(obsdiff.UserError, match=r"the process that times .* failed .*: .*not found") as caught:
        clock.time_in_new_process(dense.transformer, pipe.transformer, timing.arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:latency.0.97 came to")  # a busy machine may miss it
def test_the_real_clock_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "PROCESS_S", 0.5)
    monkeypatch.setattr(latency, "ROUNDS", 3)
    pipe = make_pipe().to(torch.bfloat16)
    statistics = obsdiff.calibrate(pipe, PROMPTS[:1], steps=1)
    asked = PruningOptions(pattern="structured:0.3", allocation="uniform", budget="latency:0.97", spare_blocks=[])
    found = allocate(pipe, asked, statistics, PROMPTS, store=tmp_path)
    low, high = found.record["achieved_interval"]
    assert 0 < low <= found.record["achieved"] <= high < 2
    kept = json.loads((tmp_path / latency.FILE).read_text())["times"]
    assert len(kept) >= 3 and all(kept.values())
