"""Calibrations in reduced precision: how little they change, what keeps them apart, and what is refused."""

import json

import pytest
import torch

import obsdiff
from obsdiff.allocation.stage import calibration_prompts
from obsdiff.cli.main import main
from obsdiff.models.families.base import TEXT
from obsdiff.obs import precision
from obsdiff.obs.hessian import Gram
from obsdiff.obs.linalg import quadratic_error
from obsdiff.obs.observers import OBSERVERS
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.statistics import open_statistics
from tests.conftest import make_pipe
from tests.obs.rounding import round_everywhere
from tests.obs.same import same_sums

PROMPTS = ["a seven", "a two", "a nine"]
SMALL = ["--calibration.num_prompts", "3", "--evaluation.num_images", "0", "--allocation", "uniform"]


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_everywhere(monkeypatch)


def calibrated(*names, **settings):
    return obsdiff.calibrate(make_pipe(), PROMPTS, needs={"gram", *names}, **settings)


@pytest.mark.parametrize("name", ["tf32", "bfloat16"])
def test_solves_lose_no_more_by_exact_moments(name):
    """Within 0.1 % of the error of a solve by float32 moments, over all layers."""
    exact, rounded = calibrated(), calibrated(name)
    lost = []
    for statistics in (exact, rounded):
        pipe = make_pipe()
        dense = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
        report = obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics, spare_blocks=())
        graph, errors = obsdiff.models.subject.subject_of(pipe).graph, []
        for site in graph.sites:
            hessian = exact.site(site.name).hessian()
            for layer in site.layers:
                if layer in report.masks:
                    new, old = graph.weight(layer).detach(), dense[f"{layer}.weight"]
                    errors.append(quadratic_error(new - old, hessian) / quadratic_error(old, hessian))
        lost.append(sum(errors) / len(errors))
    assert lost[0] > 0 and lost[1] <= 1.001 * lost[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-sd3", "emoji-sd3"])
def test_rounded_to_8_bits_solves_of_trained_layers_lose_little_more(name):
    """Within 0.2 % by exact moments about the mean, which biases take up."""
    count = PruningOptions(calibration=CalibrationOptions(num_prompts=8))
    prompts = calibration_prompts(obsdiff.load_pipeline(name), count)
    exact, rounded = (
        obsdiff.calibrate(obsdiff.load_pipeline(name), prompts, steps=8, batch_size=8, needs={"gram", *more})
        for more in ((), ("int8",))
    )
    lost = []
    for statistics in (exact, rounded):
        pipe, errors = obsdiff.load_pipeline(name), []
        dense = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
        report = obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics)
        graph = obsdiff.models.subject.subject_of(pipe).graph
        for layer in report.masks:
            covariance = exact.site(graph.site_of[layer].name).covariance()
            new, old = graph.weight(layer).detach(), dense[f"{layer}.weight"]
            errors.append(quadratic_error(new - old, covariance) / quadratic_error(old, covariance))
        lost.append(sum(errors) / len(errors))
    assert lost[0] > 0 and lost[1] != lost[0] and lost[1] <= 1.002 * lost[0]


@pytest.mark.parametrize(
    "way", [calibrated, lambda *names: obsdiff.stream(make_pipe(), PROMPTS, needs={"gram", *names})]
)
def test_the_fingerprint_tells(way):
    assert "precision" not in way().fingerprint and "precision" not in way("float32").fingerprint
    for name in ("bfloat16", "int8"):
        assert way(name).fingerprint == {**way().fingerprint, "precision": name}


def test_what_ranks_go_by_is_not_rounded(tmp_path):
    graph = obsdiff.models.subject.subject_of(make_pipe()).graph
    exact, kept = calibrated(), calibrated("bfloat16", store=tmp_path / "kept")
    assert kept.folder is not None and {type(kept.site(site.name)) for site in graph.vectors} == {Gram}
    assert {type(kept.site(site.name)) for site in graph.sites if site not in graph.vectors} == {
        OBSERVERS["gram in bfloat16"]
    }
    for site in graph.vectors:
        assert same_sums(kept.site(site.name), exact.site(site.name))
    image = [site.name for site in graph.sites if site not in graph.vectors and TEXT not in site.tokens]
    assert len(image) > 5  # of a dozen text tokens a call nothing is rounded
    assert not any(same_sums(kept.site(name), exact.site(name)) for name in image)


@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_the_blocks_own_calls_are_rounded_and_nothing_else(way):
    pipe = make_pipe()
    subject = obsdiff.models.subject.subject_of(pipe, PROMPTS)
    graph, seen = subject.graph, {}

    def keep(name, found):
        seen.setdefault(name, found.detach().clone())

    block, times = graph.layer(graph.stages[0]), pipe.transformer.time_text_embed
    handles = [block.register_forward_hook(lambda *call: keep("block", call[2][-1]))]
    handles.append(times.register_forward_hook(lambda *call: keep("times", call[2])))
    handles.append(block.norm1.linear.register_forward_hook(lambda *call: keep("modulation", call[2])))

    def calls(*names):
        seen.clear()
        if way == "whole":
            obsdiff.calibrate(subject, PROMPTS, needs={"gram", *names}, steps=2)
        else:
            obsdiff.stream(subject, PROMPTS, needs={"gram", *names}, steps=2).record()
        return dict(seen)

    exact, rounded, after, integers = calls(), calls("bfloat16"), calls(), calls("int8")
    for handle in handles:
        handle.remove()
    assert torch.equal(exact["times"], rounded["times"])
    assert torch.equal(exact["modulation"], rounded["modulation"])  # within the block, but of one vector a call
    assert not torch.equal(exact["block"], rounded["block"]) and torch.equal(exact["block"], after["block"])
    torch.testing.assert_close(rounded["block"], exact["block"], rtol=0.05, atol=0.05)
    assert torch.equal(exact["block"], integers["block"])  # of integers are products of Hessians alone


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_no_rounding_behind(error, monkeypatch):
    subject = obsdiff.models.subject.subject_of(make_pipe(), PROMPTS)
    layer, x = torch.nn.Linear(64, 64), torch.randn(64, 64)
    wanted = layer(x)

    failing, forward = subject.graph.layer(subject.graph.sites[0].name), torch.nn.Linear.forward

    def fail(self, given):
        if self is failing:
            raise error
        return forward(self, given)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(torch.nn.Linear, "forward", fail)
        obsdiff.calibrate(subject, PROMPTS, needs={"gram", "bfloat16"})
    assert torch.equal(layer(x), wanted)


def test_stores_keep_apart(tmp_path):
    calibrated(store=tmp_path / "float32")
    calibrated("tf32", store=tmp_path / "tf32")
    assert calibrated(store=tmp_path / "tf32").fingerprint["precision"] == "tf32"  # whatever there is serves
    assert calibrated("float32", store=tmp_path / "float32").observer == "gram"
    with pytest.raises(
        obsdiff.UserError, match=r"hold only the gram in tf32 of H, .* needs float32; calibrate for that"
    ):
        calibrated("float32", store=tmp_path / "tf32")
    for there, said, wanted in (("float32", "none", "tf32"), ("tf32", '"tf32"', "bfloat16")):
        with pytest.raises(obsdiff.UserError, match=rf'precision \({said} there, "{wanted}" now\)'):
            calibrated(wanted, store=tmp_path / there)


def test_a_store_is_read_where_no_such_products_are(tmp_path, monkeypatch):
    calibrated("bfloat16", store=tmp_path / "kept")
    monkeypatch.setattr(precision, "offers", lambda name, device: name == "float32")
    assert len(list(calibrated("bfloat16", store=tmp_path / "kept"))) > 0
    with pytest.raises(obsdiff.UserError, match="this CPU has no products in bfloat16"):
        calibrated("bfloat16", store=tmp_path / "other")
    with pytest.raises(obsdiff.UserError, match="this CPU has no products in tf32"):
        obsdiff.stream(make_pipe(), PROMPTS, needs={"gram", "tf32"})


def test_two_at_once():
    with pytest.raises(obsdiff.UserError, match="nothing measures bfloat16 and gram and tf32 at once; needs are of"):
        calibrated("bfloat16", "tf32")


@pytest.mark.parametrize("streamed", [[], ["--calibration.streamed", "true"]])
def test_the_command_says_so(pipe_folder, tmp_path, streamed):
    told = [*SMALL, *streamed, "--calibration.precision", "bfloat16"]
    main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), *told])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["precision"] == "bfloat16"
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert manifest["statistics"]["precision"] == "bfloat16"


def test_a_kept_calibration_says_what_it_is(pipe_folder, tmp_path):
    kept = [*SMALL, "--statistics", str(tmp_path / "kept")]
    first = [*kept, "--calibration.precision", "tf32"]
    main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "one"), *first])
    main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "two"), *kept])
    assert open_statistics(tmp_path / "kept").observer == "gram in tf32"
    for name in ("one", "two"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["calibration"]["precision"] == "tf32"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--calibration.precision", "half"],
            "unknown choice calibration.precision 'half'; choose one of float32, tf32",
        ),
        (
            ["--calibration.precision", "tf32", "--method", "magnitude"],
            "is of whole Hessians, and magnitude asks for none",
        ),
        (["--calibration.precision", "tf32", "--method", "wanda"], "is of whole Hessians, and wanda asks for none"),
        (["--calibration.precision", "tf32", "--pattern", "depth:1"], "--calibration.precision has no effect"),
    ],
)
def test_what_it_has_no_part_in(pipe_folder, tmp_path, capsys, more, said):
    options = [*SMALL[:-2], *(SMALL[-2:] if "depth:1" not in more else []), *more]
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), *options])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_device_without_it_is_refused_before_anything_is_done(pipe_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "offers", lambda name, device: name == "float32")
    monkeypatch.setattr(obsdiff.export.run, "load_suite", lambda *_: pytest.fail("went on"))
    options = ["--pattern", "depth:1+unstructured:0.5", "--calibration.precision", "bfloat16", *SMALL[:2]]
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), *options])
    assert "this CPU has no products in bfloat16; use precision float32" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_kept_for_others_it_is_whole_and_found_again(pipe_folder, tmp_path, method):
    told = [*SMALL, "--calibration.precision", "bfloat16", "--statistics", str(tmp_path / "kept"), "--method", method]
    for name in ("one", "two"):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / name), *told])
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["calibration"]["precision"] == "bfloat16" and report["calibration"]["reused"] is (name == "two")
    assert open_statistics(tmp_path / "kept").observer == "gram in bfloat16"
    told[told.index("bfloat16")] = "float32"
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "three"), *told])


def test_a_precision_alone_is_of_whole_hessians():
    assert obsdiff.calibrate(make_pipe(), PROMPTS, needs="float32").observer == "gram"
    assert obsdiff.calibrate(make_pipe(), PROMPTS, needs=["tf32"]).observer == "gram in tf32"


def test_a_calibration_that_was_cut_off_goes_on_as_it_began(tmp_path, monkeypatch):
    whole = calibrated("bfloat16", batch_size=1)
    monkeypatch.setattr(obsdiff.pruning.calibrate, "SAVE_EVERY_S", 0.0)
    run = obsdiff.pruning.calibrate.run_trajectories

    def cut_off(*given):
        batches = run(*given)
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(obsdiff.pruning.calibrate, "run_trajectories", cut_off)
        calibrated("bfloat16", batch_size=1, store=tmp_path / "kept")
    with pytest.raises(obsdiff.UserError, match="begun for the gram in bfloat16 of H, not the gram; ask for the same"):
        calibrated(batch_size=1, store=tmp_path / "kept")
    found = calibrated("bfloat16", batch_size=1, store=tmp_path / "kept")
    assert all(same_sums(found.site(name), whole.site(name)) for name in whole)


@pytest.mark.parametrize("pattern", ["structured:0.3+lowrank:0.5", "structured:0.3+2:4"])
def test_whatever_goes_by_hessians(pattern):
    errors = [
        obsdiff.prune(make_pipe(), pattern, statistics=statistics, spare_blocks=()).mean_layer_error
        for statistics in (calibrated(), calibrated("bfloat16"))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.01) and errors[1] != errors[0]


def test_comparisons_measure_for_every_method(tmp_path):
    from obsdiff.compare.cells import units_of
    from obsdiff.compare.options import CompareOptions
    from obsdiff.pruning.options import CalibrationOptions

    options = CompareOptions(
        pipeline="digits-sd3", output=str(tmp_path), methods=["obs", "wanda", "magnitude"],
        patterns=["unstructured:0.5"], allocations=["uniform"], calibration=CalibrationOptions(precision="tf32"),
    )  # fmt: skip
    units, left_out = units_of(options)
    assert [unit.method for unit in units[:3]] == options.methods and not left_out
    options.calibration.precision = "half"
    with pytest.raises(obsdiff.UserError, match=r"unknown choice calibration\.precision 'half'"):
        units_of(options)
