"""What a caller may hand over by mistake is refused in one line, before anything runs."""

import copy
import math

import pytest
import torch

import obsdiff
from obsdiff.criteria import GroupProblem
from obsdiff.criteria.structured import choose_groups
from obsdiff.obs.structured import Consumer
from obsdiff.pruning.options import CalibrationOptions, PruningOptions, ScanOptions
from obsdiff.pruning.planfile import parse_plan
from obsdiff.pruning.record import record_trajectories
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.trajectories import noise_seeds


@pytest.fixture
def untouched(pipe, monkeypatch):
    """A pipeline that may not run."""
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("the denoiser ran"))
    return pipe


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a digit seven", r"one string.*give a list"),
        (b"a digit seven", "one string"),
        (["a seven", None], "prompt 1 is 'None', a NoneType"),
        (["a seven", float("nan")], "prompt 1 is 'nan', a float"),
        ([["a", "b"]], "prompt 0 .* a list"),
        ({"a seven"}, "prompts are a set"),
        ([], "no calibration prompts"),
        (None, "prompts are a NoneType"),
    ],
)
def test_prompts_are_a_list_of_strings(untouched, tmp_path, prompts, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.calibrate(untouched, prompts)
    with pytest.raises(obsdiff.UserError, match=message):
        record_trajectories(untouched, prompts, tmp_path / "kept")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, r"steps is 2\.5; it must be a whole number"),
        ({"steps": True}, "steps is True"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"tokens": 3.0}, r"calibration\.tokens is 3\.0; it must be a whole number"),
        ({"tokens": math.nan}, "tokens is nan"),
        ({"batch_size": math.inf}, "batch_size is inf"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a whole number from 0 to"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_calibration_values(untouched, prompts, options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.calibrate(untouched, prompts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": math.inf}, r"calibration\.damping is inf"),
        ({"damping": math.nan}, "damping is nan"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"damping": "0.1"}, "damping is '0.1'"),
        ({"packages": 1.5}, "packages is 1.5"),
        ({"seed": -3}, "seed is -3"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": math.nan}, "seed is nan"),
    ],
)
def test_pruning_values(untouched, options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.prune(untouched, "unstructured:0.5", method="random", **options)


def test_statistics_are_statistics(untouched):
    with pytest.raises(obsdiff.UserError, match=r"statistics are a str; give what obsdiff\.calibrate returns"):
        obsdiff.prune(untouched, "unstructured:0.5", statistics="folder")


def test_sites_must_be_there(pipe, prompts):
    with pytest.raises(obsdiff.UserError, match=r"no site transformer_blocks\.0\.attn\.to_k; sites are named"):
        obsdiff.calibrate(pipe, prompts, sites={"transformer_blocks.0.attn.to_k"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "foo"}, "unknown method 'foo'"),
        ({"calibration": CalibrationOptions(batch_size=0)}, "batch_size is 0"),
        ({"scan": ScanOptions(triples=0)}, "triples is 0"),
        ({"scan": ScanOptions(levels=[math.nan])}, "levels holds nan"),
        ({"calibration": CalibrationOptions(damping=math.nan)}, "damping is nan"),
    ],
)
def test_allocation_values(untouched, prompts, options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.allocate(untouched, PruningOptions(**options), Statistics({}), prompts)
    with pytest.raises(obsdiff.UserError, match="one string"):
        obsdiff.allocate(untouched, PruningOptions(), Statistics({}), prompts[0])


def test_a_calibration_that_was_cut_off_is_not_continued_with_more_layers(pipe, prompts, tmp_path, monkeypatch):
    """Layers that are new would be measured on the rest of the prompts alone."""
    from obsdiff.pruning import calibrate as module

    def save_then_die(statistics, folder, real=module.save_statistics):
        real(statistics, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "SAVE_EVERY_S", 0.0)
        patched.setattr(module, "save_statistics", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            obsdiff.calibrate(
                pipe, prompts, steps=1, batch_size=2, store=tmp_path, sites={"transformer_blocks.0.attn.to_q"}
            )
    with pytest.raises(obsdiff.UserError, match="begun without 22 of the layers"):
        obsdiff.calibrate(pipe, prompts, steps=1, batch_size=2, store=tmp_path)


def test_the_largest_seed_works(pipe, prompts):
    assert noise_seeds(7, 3, 1) == [7 * 1_000_003 + index for index in (1, 2, 3)]
    seed = 2**63 - 1
    statistics = obsdiff.calibrate(pipe, prompts[:2], steps=1, seed=seed)
    obsdiff.prune(pipe, "unstructured:0.5", method="random", statistics=statistics, seed=seed)


def test_a_multiple_that_a_layer_does_not_hold_once(pipe):
    with pytest.raises(obsdiff.UserError, match=r"multiple_of 100000 does not fit .*\.ff: it has 64 neurons"):
        obsdiff.prune(pipe, "structured:heads=0,ffn=0.5,multiple_of=100000", method="magnitude")


def test_a_multiple_matters_only_where_neurons_go(pipe):
    obsdiff.prune(pipe, "structured:heads=0.5,ffn=0,multiple_of=100000", method="magnitude")
    assert pipe.transformer.transformer_blocks[1].ff.net[2].weight.shape == (16, 64)


@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_statistics_of_other_weights_are_refused(pipe, prompts, method):
    statistics = obsdiff.calibrate(pipe, prompts[:2], steps=1)
    pipe.transformer.transformer_blocks[1].attn.to_q.weight.data[0, 0] += 1
    with pytest.raises(obsdiff.UserError, match=r"measured on other weights \(model \w+ there, \w+ now\)"):
        obsdiff.prune(pipe, "unstructured:0.5", method=method, statistics=statistics)
    with pytest.raises(obsdiff.UserError, match="measured on other weights"):
        obsdiff.allocate(pipe, PruningOptions(allocation="owl"), statistics, prompts[:2])


def test_pruning_again_needs_statistics_of_the_pruned_weights(pipe, prompts):
    dense = obsdiff.calibrate(pipe, prompts[:2], steps=1)
    obsdiff.prune(pipe, "unstructured:0.3", statistics=dense)
    with pytest.raises(obsdiff.UserError, match="measured on other weights"):
        obsdiff.prune(pipe, "unstructured:0.6", statistics=dense, prune_again=True)
    pruned = obsdiff.calibrate(pipe, prompts[:2], steps=1)
    report = obsdiff.prune(pipe, "unstructured:0.6", statistics=pruned, prune_again=True)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)


def test_packages_calibrate_the_weights_as_they_are(pipe, prompts):
    def measure(sites):
        return obsdiff.calibrate(pipe, prompts[:2], steps=1, sites=sites)

    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=measure, packages=3)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_an_unknown_rule_for_groups_is_an_error():
    groups = GroupProblem([Consumer(torch.randn(4, 8))], [], 8, 1, 2, "reciprocal_rank", 0.01, 0)
    with pytest.raises(ValueError, match="unknown rule 'magnitde'"):
        choose_groups("magnitde", groups)


PLAN = "format: 1\npattern: 2:4\nlayers:\n  a.to_q: 2:4\n  a.to_k: {}\n"


def test_plans_may_leave_out_quotes(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.format("dense"))
    plan, content = parse_plan(tmp_path / "plan.yaml")
    assert content["format"] == 1
    assert {name: str(pattern) for name, pattern in plan.entries.items()} == {
        "a.to_q": "2:4",
        "a.to_k": "unstructured:0",
    }


@pytest.mark.parametrize("second", ["a.to_q: 2:4", "'a.to_q': 1:4"])
def test_a_layer_that_stands_twice_is_refused(tmp_path, second):
    (tmp_path / "plan.yaml").write_text(PLAN.format("2:4") + f"  {second}\n")
    with pytest.raises(obsdiff.UserError, match=r"is not a plan: the key 'a\.to_q' stands there twice \(line 6\)"):
        parse_plan(tmp_path / "plan.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.format("2:4") + "pattern: 1:4\n")
    with pytest.raises(obsdiff.UserError, match="'pattern' stands there twice"):
        parse_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("pattern", "told", "message"),
    [
        ("unstructured:0.5", {"refit": False}, "are in the options; leave them out"),
        ("unstructured:0.5", {"seed": 1}, "are in the options; leave them out"),
        ("2:4", {}, "is for single weights by ratio; leave it out with 2:4"),
        ("structured:0.5", {}, "leave it out with structured:0.5"),
    ],
)
def test_options_of_solving_say_all_of_it(untouched, pattern, told, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.prune(untouched, pattern, method=obsdiff.SolveOptions("obs", compared=64), **told)


@pytest.mark.parametrize(
    ("method", "columns", "message"),
    [
        ("wanda", 64, "wanda compares scores otherwise"),
        ("obs", 48, "must be a multiple of 32"),
        ("obs", 0, "at least 32"),
    ],
)
def test_columns_that_no_sweep_compares_are_refused(untouched, method, columns, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.prune(untouched, "unstructured:0.5", method=obsdiff.SolveOptions(method, compared=columns))


@pytest.mark.parametrize(
    ("pattern", "method", "message"),
    [("2:4", "wanda", "and there is no refit"), ("structured:0.5", "obs", "is solved for in closed form")],
)
def test_steps_of_a_refit_that_is_not_there_are_refused(untouched, pattern, method, message):
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.prune(untouched, pattern, method=obsdiff.SolveOptions(method, refit_steps=3))


def test_options_of_solving_are_the_arguments(pipe, prompts):
    statistics = obsdiff.calibrate(pipe, prompts)
    told = obsdiff.prune(copy.deepcopy(pipe), "2:4", method="sparsegpt", statistics=statistics, refit=True, damping=0.1)
    options = obsdiff.SolveOptions("sparsegpt", refit=True, damping=0.1)
    report = obsdiff.prune(pipe, "2:4", method=options, statistics=statistics)
    assert (report.method, report.refit, report.layer_error) == ("sparsegpt", True, told.layer_error)
    assert all(torch.equal(mask, told.masks[name]) for name, mask in report.masks.items())
