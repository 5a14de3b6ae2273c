"""Two real processes calibrate and prune a tiny pipeline, one of them alone meets trouble, and a run on another number
of processes goes on from what they leave."""

from functools import partial

import pytest
import torch
from torch import distributed, multiprocessing

import obsdiff
from obsdiff.pruning import calibrate as module
from obsdiff.pruning import unfinished
from obsdiff.pruning.collect import Collector
from obsdiff.pruning.statistics import Statistics, save_statistics
from tests.conftest import make_pipe

LAYER = "transformer_blocks.1.attn.to_out.0"
PROMPTS = ["a seven", "a two", "a handwritten digit nine", "a one", "the digit four", "a three"]


def stopped_after(saves, patch, *args, **kwargs):
    """A calibration that is stopped when it has saved what it has so often."""
    done = []

    def save(*given):
        save_statistics(*given)
        done.append(given)
        if len(done) == saves:
            raise KeyboardInterrupt

    with patch.context() as now, pytest.raises(KeyboardInterrupt):
        now.setattr(module, "SAVE_EVERY_S", 0.0)
        now.setattr(module, "save_statistics", save)
        obsdiff.calibrate(*args, **kwargs)


def counted(patch):
    """The prompts that are run from now on, by trajectory."""
    seen, real = [], Collector.begin

    def begin(self, conditioning, seeds, part):
        seen.extend(seeds[part])
        real(self, conditioning, seeds, part)

    patch.setattr(Collector, "begin", begin)
    return seen


def share(rank, folder):
    """One of two processes."""
    store = distributed.FileStore(f"{folder}/meet", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    patch, found = pytest.MonkeyPatch(), {}
    pipe = make_pipe()

    def overflows(self, site, layer, inputs, real=Collector.see):
        real(self, site, layer, (inputs[0] * float("inf"),) if rank and site.name == LAYER else inputs)

    with patch.context() as now, pytest.raises(obsdiff.UserError) as refused:
        now.setattr(Collector, "see", overflows)
        obsdiff.calibrate(pipe, PROMPTS[:2], steps=1, batch_size=1, store=f"{folder}/inf")
    found["inf"] = str(refused.value)
    stopped_after(2 - rank, patch, pipe, PROMPTS, batch_size=1, store=f"{folder}/two")
    with patch.context() as now:
        seen = counted(now)
        statistics = obsdiff.calibrate(pipe, PROMPTS, batch_size=1, store=f"{folder}/one")
        found["run"] = seen
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics, spare_blocks=[])
    found["masks"], found["weights"] = dict(report.masks), pipe.transformer.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process found, and the folder."""
    folder = tmp_path_factory.mktemp("two")
    stopped_after(2, pytest.MonkeyPatch(), make_pipe(), PROMPTS, batch_size=1, store=folder / "one")
    (folder / "one.unfinished").rename(folder / "one.unfinished-2-of-3")  # as the last of three may leave it
    multiprocessing.spawn(share, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


@pytest.fixture(scope="module")
def whole():
    return obsdiff.calibrate(make_pipe(), PROMPTS, batch_size=1)


def assert_close(found, wanted):
    assert set(found) == set(wanted) and found.prompts_done == len(PROMPTS)
    for name in wanted:
        site, other = found.site(name), wanted.site(name)
        assert site.num_tokens == other.num_tokens and site.weight_sum == pytest.approx(other.weight_sum)
        torch.testing.assert_close(site.hessian(), other.hessian(), rtol=1e-3, atol=1e-4)


def test_what_is_not_finite_on_one_process_ends_all_with_the_name_of_the_layer(two):
    found, folder = two
    for process in found:
        assert process["inf"].startswith(f"layer {LAYER} saw non-finite activations during calibration")
    assert not (folder / "inf").exists()


def test_two_processes_go_on_from_another_number_and_prune_as_one(two, whole):
    found, folder = two
    run = sorted(found[0]["run"] + found[1]["run"])
    assert run == [2, 3, 4, 5] and len(found[0]["run"]) == 2  # of six, two were there
    assert_close(obsdiff.calibrate(make_pipe(), PROMPTS, store=folder / "one"), whole)
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=whole, spare_blocks=[])
    for process in found:
        assert process["masks"].keys() == report.masks.keys()
        assert all(torch.equal(mask, report.masks[name]) for name, mask in process["masks"].items())
        for name, tensor in pipe.transformer.state_dict().items():
            torch.testing.assert_close(process["weights"][name], tensor, rtol=1e-3, atol=1e-4)
    assert not list(folder.glob("one.unfinished*"))


def test_one_process_goes_on_from_what_two_have_left(two, whole, capsys, monkeypatch):
    """In batches of another size, so that no share would begin where theirs did."""
    _, folder = two
    assert sorted(path.name for path in folder.glob("two*")) == ["two.unfinished-0-of-2", "two.unfinished-1-of-2"]
    seen = counted(monkeypatch)
    found = obsdiff.calibrate(make_pipe(), PROMPTS, batch_size=2, store=folder / "two", quiet=False)
    assert seen == [2, 4, 5]
    assert "going on from 3 prompts, measured by another number of processes" in capsys.readouterr().err
    assert_close(found, whole)
    assert [path.name for path in folder.glob("two*")] == ["two"]


def sums(folder, *prompts, fingerprint="x"):
    save_statistics(Statistics({"model": fingerprint}, prompts=prompts), folder)
    return folder


def test_no_prompt_is_counted_twice(tmp_path, monkeypatch, capsys):
    """Whatever killed runs of several numbers of processes have left."""
    store, fingerprint = tmp_path / "store", {"model": "x"}
    first = sums(tmp_path / "store.unfinished-0-of-2", 0, 1, 2, 6)
    second = sums(tmp_path / "store.unfinished-1-of-2", 4, 5)
    sums(tmp_path / "store.unfinished", 0, 1, 2)  # in the first one
    sums(tmp_path / "store.unfinished-0-of-3", 7, 5)
    third = sums(tmp_path / "store.unfinished-2-of-3", 3)
    mine = sums(tmp_path / "store.unfinished-mine", 8)  # somebody else's name
    asked = {}
    for count in (1, 2, 3):
        monkeypatch.setattr(unfinished, "world_size", lambda count=count: count)
        for rank in range(count):
            monkeypatch.setattr(unfinished, "rank", lambda rank=rank: rank)
            asked[count, rank] = unfinished.to_go_on_from(store, fingerprint, quiet=False)
    # 0-of-3 has as many as 1-of-2, and comes first; 5 is then measured already
    left = tmp_path / "store.unfinished-0-of-3"
    assert asked[1, 0] == [first, left, third]
    assert asked[2, 0][0] == first and sorted(asked[2, 0] + asked[2, 1]) == [first, left, third]
    assert asked[3, 0] == [first, left] and asked[3, 1] == [] and asked[3, 2] == [third]
    assert f"{second} counts prompts that others count, too" in capsys.readouterr().err
    unfinished.remove_unfinished(store)
    assert list(tmp_path.iterdir()) == [mine]


def test_what_was_merged_goes_with_the_first_save(tmp_path):
    own, other = sums(tmp_path / "own", 0, 1), sums(tmp_path / "other", 1)
    (other / "mine.txt").write_text("a user's")
    kept = unfinished.Unfinished(own, [other])
    kept.saved()
    assert own.exists() and [path.name for path in other.iterdir()] == ["mine.txt"] and not kept.merged


def test_unfinished_sums_that_cannot_be_gone_on_from(tmp_path, capsys):
    store = tmp_path / "store"
    ask = partial(unfinished.to_go_on_from, store, {"model": "x"}, False)
    folder = sums(tmp_path / "store.unfinished-1-of-2", 3, fingerprint="other")
    with pytest.raises(obsdiff.UserError, match=r"store\.unfinished-1-of-2 belong to another model"):
        ask()
    index = folder / "statistics.json"
    text = index.read_text().replace('"other"', '"x"')
    index.write_text(text.replace('"prompts":', '"of_an_earlier_version":'))
    assert ask() == [] and "does not tell its prompts; they are measured again" in capsys.readouterr().err
    index.write_text(text[:-20])
    with pytest.raises(obsdiff.UserError, match=r"statistics\.json is not a statistics store"):
        ask()
