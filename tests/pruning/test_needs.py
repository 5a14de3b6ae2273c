"""A calibration accumulates what a method needs: a store with more serves it, one with less is refused."""

import json

import pytest
import torch

import obsdiff
from obsdiff.allocation.planning import needs_for
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.pruning import collect
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.statistics import open_statistics
from tests.conftest import make_pipe

PROMPTS = ["a seven", "a two"]


@pytest.fixture(scope="module")
def diagonal():
    return obsdiff.calibrate(make_pipe(), PROMPTS, needs={"diagonal"})


@pytest.fixture(scope="module")
def gram():
    return obsdiff.calibrate(make_pipe(), PROMPTS)


def test_the_diagonal_of_the_whole(diagonal, gram):
    assert (diagonal.observer, gram.observer) == ("diagonal", "gram") and list(diagonal) == list(gram)
    for name in gram:
        few, all_ = diagonal.site(name), gram.site(name)
        assert few.variances().shape == few.centre.shape and few.num_tokens == all_.num_tokens
        torch.testing.assert_close(few.power(), all_.power(), rtol=1e-4, atol=1e-6)
    assert diagonal.fingerprint == gram.fingerprint


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4"])
def test_wanda_gives_the_same_masks_from_the_diagonal(diagonal, gram, pattern):
    few, all_ = (obsdiff.prune(make_pipe(), pattern, method="wanda", statistics=s) for s in (diagonal, gram))
    assert all(torch.equal(few.masks[name], all_.masks[name]) for name in all_.masks)
    assert few.layer_error == {} and set(all_.layer_error) == set(all_.masks)
    assert few.notes == ["only the diagonal of H was measured, so there are no layer errors"] and all_.notes == []
    once = obsdiff.prune(  # statistics that are let go as they are used
        make_pipe(),
        pattern,
        method="wanda",
        statistics=lambda sites: obsdiff.calibrate(make_pipe(), PROMPTS, needs=["diagonal"]),
    )
    assert once.notes == few.notes


@pytest.mark.parametrize("options", [{"method": "obs"}, {"method": "sparsegpt"}, {"method": "wanda", "refit": True}])
def test_the_diagonal_does_not_serve_methods_that_need_more(pipe, diagonal, options):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    wanted = (
        rf"hold only the diagonal of H, method {options['method']} needs gram; calibrate for that \(needs=\['gram'\]\)$"
    )
    for statistics in (diagonal, lambda sites: diagonal):
        with pytest.raises(obsdiff.UserError, match=wanted):
            obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_the_diagonal_serves_owl_and_no_scan(pipe, diagonal):
    owl = PruningOptions(pattern="unstructured:0.5", allocation="owl")
    assert obsdiff.allocate(pipe, owl, diagonal, PROMPTS).plan.rule == "owl"
    with pytest.raises(obsdiff.UserError, match="the measured allocation needs gram"):
        obsdiff.allocate(pipe, PruningOptions(pattern="unstructured:0.5"), diagonal, PROMPTS)


def test_magnitude_takes_heads_by_either(diagonal):
    report = obsdiff.prune(make_pipe(), "structured:0.3", method="magnitude", statistics=diagonal)
    assert report.layer_error == {} and report.shrunk


def test_stores(pipe, tmp_path):
    kept = obsdiff.calibrate(pipe, PROMPTS, store=tmp_path / "whole")
    assert open_statistics(tmp_path / "whole").observer == "gram"
    assert obsdiff.calibrate(pipe, PROMPTS, store=tmp_path / "whole", needs=["diagonal"]).observer == "gram"
    few = obsdiff.calibrate(pipe, PROMPTS, store=tmp_path / "few", needs=["diagonal"])
    assert few.observer == "diagonal"
    size = [sum(f.stat().st_size for f in (tmp_path / name / "sites").iterdir()) for name in ("few", "whole")]
    assert 4 * size[0] < size[1]
    for name in kept:
        torch.testing.assert_close(few.site(name).power(), kept.site(name).power(), rtol=1e-4, atol=1e-6)
    with pytest.raises(obsdiff.UserError, match=r"in .*few hold only the diagonal.*into another folder"):
        obsdiff.calibrate(pipe, PROMPTS, store=tmp_path / "few")


def test_a_store_of_an_earlier_version_holds_the_whole(pipe, tmp_path):
    obsdiff.calibrate(pipe, PROMPTS, store=tmp_path / "store")
    path = tmp_path / "store" / "statistics.json"
    index = json.loads(path.read_text())
    del index["observer"]
    path.write_text(json.dumps(index))
    obsdiff.prune(pipe, "unstructured:0.5", statistics=open_statistics(tmp_path / "store"))
    path.write_text(json.dumps({**index, "observer": "colours"}))
    with pytest.raises(obsdiff.UserError, match="holds colours, which this version does not know"):
        open_statistics(tmp_path / "store")


def test_unknown_needs_are_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("the denoiser ran"))
    with pytest.raises(obsdiff.UserError, match="nothing measures colours"):
        obsdiff.calibrate(pipe, PROMPTS, needs=["colours"])


def test_the_stage_measures_what_the_method_needs(pipe, monkeypatch, tmp_path):
    made = []
    real = collect.OBSERVERS["diagonal"].empty.__func__
    monkeypatch.setattr(
        collect.OBSERVERS["diagonal"], "empty", classmethod(lambda cls, *given: made.append(cls) or real(cls, *given))
    )
    report = prune_stage(pipe, PruningOptions(method="wanda"), PROMPTS)
    assert made and report.layer_error == {} and report.fingerprint["weighting"] == "log_decrease"
    wanda = PruningOptions(method="wanda")
    assert needs_for(wanda, None) == {"diagonal"} and needs_for(wanda, tmp_path) == {"gram"}
    assert needs_for(PruningOptions(method="wanda", refit=True), None) >= {"gram"}
    assert needs_for(PruningOptions(method="wanda", allocation="owl"), None) == {"gram"}
    obsdiff.calibrate(make_pipe(), PROMPTS, store=tmp_path / "few", needs=["diagonal"])
    kept = prune_stage(make_pipe(), wanda, PROMPTS, Folders(statistics=tmp_path / "few"))
    assert all(torch.equal(kept.masks[name], mask) for name, mask in report.masks.items())
