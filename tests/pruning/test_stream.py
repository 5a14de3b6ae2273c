"""Calibration stage by stage, against whole calls of the denoiser as it is at each stage."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import obsdiff
from obsdiff.allocation.fitting import plan_loaded
from obsdiff.allocation.stage import prepare, prune_stage
from obsdiff.cli.main import main
from obsdiff.embedded.digits import digit_prompts
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info
from obsdiff.models.modes import eval_mode
from obsdiff.models.nested import copied_to, tensors_in
from obsdiff.models.replay import MadeCall
from obsdiff.models.subject import subject_of
from obsdiff.pruning.collect import collecting
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions, PruningOptions
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.stream import Stream, stream
from obsdiff.pruning.trajectories import CallCounter
from tests.conftest import CALL, make_pipe
from tests.families import unets
from tests.families.pipelines import PIPELINES, each
from tests.training.common import assert_zero, fit

ROWS = 3


def of_family(name, encoders=False):
    """A tiny pipeline, what it is told, and a pattern of units."""
    row = PIPELINES[name]
    given = row.conditioning(ROWS)
    told = Conditioning({}, count=ROWS) if set(given) <= {"batch_size"} else Conditioning(given)
    pipe = row.build(encoders=encoders)
    attach_info(pipe, PipelineInfo(row.pipeline, {k: v for k, v in row.call.items() if k in CALL_ARGUMENTS}))
    kinds = sorted({group.kind for group in subject_of(pipe, told).graph.groups} - {"rank", "lowrank"})
    return pipe, told, f"structured:{','.join(f'{kind}=0.5' for kind in kinds)},multiple_of=1"


def assert_same(found, wanted):
    """Equal moments, up to rounding."""
    assert found.num_tokens == wanted.num_tokens
    assert found.weight_sum == pytest.approx(wanted.weight_sum)
    for group in range(len(wanted.power())):
        for name in ("covariance", "mean"):
            a, b = getattr(found, name)(group), getattr(wanted, name)(group)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


class Checked(Stream):
    """Beside each answer, whole calls of the denoiser as it is now, without anything put in place of a stage."""

    seen = 0

    def __call__(self, sites):
        found = super().__call__(sites)
        graph = self.subject.graph
        chosen = [site for site in graph.sites if site.name in sites]
        whole = Statistics(self.fingerprint)
        counter = CallCounter(self.subject.pipe, self.subject.family.time)
        with (
            eval_mode(self.subject.pipe),
            torch.no_grad(),
            collecting(self.subject, chosen, self._told, self._settings, whole, counter) as collector,
        ):
            for call in self._calls:
                collector.begin(self._told, self._seeds, call.part)
                counter.calls, counter.index, counter.total = call.step
                call.model(**copied_to(call.arguments, "cpu"))
        for site in chosen:
            assert_same(found.sites[site.name], whole.sites[site.name])
        self.seen += 1
        return found


def checked(pipe, told, **options):
    made = stream(pipe, told, batch_size=2, **options)
    made.__class__ = Checked
    return made


@pytest.mark.parametrize("name", each(PIPELINES))
@pytest.mark.parametrize("kind", ["weights", "units"])
def test_each_stage_sees_what_the_pruned_ones_before_it_make(name, kind):
    pipe, told, units = of_family(name)
    graph = subject_of(pipe, told).graph
    by = checked(pipe, told)
    report = obsdiff.prune(pipe, "unstructured:0.6" if kind == "weights" else units, statistics=by, spare_blocks=())
    stages = {graph.site_of[name].stage for name in report.plan.sites(graph)}
    assert by.seen == len(stages) > 1
    assert report.streamed and report.masks


@pytest.mark.parametrize("tokens", [None, 3])
def test_on_a_dense_model_it_is_the_plain_calibration(pipe, prompts, tokens):
    graph = subject_of(pipe).graph
    plain = obsdiff.calibrate(pipe, prompts, batch_size=4, tokens=tokens)
    by = stream(pipe, prompts, batch_size=2, tokens=tokens)
    for stage in range(len(graph.stages)):
        sites = {site.name for site in graph.sites if site.stage == stage}
        found = by(sites)
        assert set(found.sites) == sites and found.fingerprint == plain.fingerprint
        for name in sites:
            assert_same(found.sites[name], plain.sites[name])


def test_only_what_the_next_stage_reads_is_held(pipe, prompts):
    graph = subject_of(pipe).graph
    by = stream(pipe, prompts, batch_size=3)
    for stage in range(len(graph.stages)):
        by({site.name for site in graph.sites if site.stage == stage})
        for call in by._calls:
            held = [name for name, answer in call.answers.items() if any(not t.is_meta for t in tensors_in(answer))]
            assert held == list(graph.stages[max(stage - 1, 0) : stage])


@pytest.mark.parametrize("name", ["sd35", "sdxl", "wan22"])
def test_calls_on_a_disk_give_the_same_to_the_bit(name, tmp_path):
    """Memory holds no answer of a stage then, and places in the file are taken again."""
    found = []
    for folder in (None, tmp_path / "new"):
        pipe, told, _ = of_family(name)
        by = stream(pipe, told, batch_size=2)
        if folder is not None:
            by.keep_on_disk(folder)
        report = obsdiff.prune(pipe, "unstructured:0.6", statistics=by)
        weights = [tensor for part in by.subject.components.values() for tensor in part.state_dict().values()]
        held = [t.nbytes for call in by._calls for t in tensors_in(call.answers) if not t.is_meta]
        found.append((weights, report.layer_error, sum(held)))
    (weights, errors, held), (same, same_errors, none) = found
    assert all(map(torch.equal, weights, same)) and errors == same_errors
    assert none == 0 < held <= by._spill._end < 1.75 * held
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(obsdiff.UserError, match="recorded already"):
        by.keep_on_disk(tmp_path)


@pytest.mark.parametrize("name", ["sd35", "flux", "ddpm", "wan22"])
def test_what_is_held_is_what_was_planned(name):
    """At its most; Flux has two lists of stages, Wan 2.2 two denoisers."""
    pipe, told, _ = of_family(name, encoders=True)
    subject = subject_of(pipe)
    by = stream(pipe, told, batch_size=2)
    graph, held = subject.graph, 0
    for stage in sorted({site.stage for site in graph.sites}):
        by({site.name for site in graph.sites if site.stage == stage})
        now = {
            id(t): t.nbytes for call in by._calls for t in tensors_in([call.arguments, call.answers]) if not t.is_meta
        }
        held = max(held, sum(now.values()))
    calibration = CalibrationOptions(num_prompts=ROWS, batch_size=2, streamed=True)
    asked = PruneOptions(pipeline=name, output="-", pattern="unstructured:0.5", calibration=calibration)
    planned = plan_loaded(subject, replace(asked, evaluation=EvaluationOptions(num_images=0)))
    assert 0.7 * planned.memory.batches.recorded < held < 1.3 * planned.memory.batches.recorded
    away = plan_loaded(subject, replace(asked, calibration=replace(calibration, calls_on_disk=True))).memory.batches
    assert away.recorded + away.on_disk == planned.memory.batches.recorded and away.on_disk > 0
    given = {id(t): t.nbytes for call in by._calls for t in tensors_in(call.arguments)}
    assert sum(given.values()) <= away.recorded
    stages = [moment.name for moment in planned.memory.moments if moment.name.startswith("calibrating")]
    assert stages[0] == f"calibrating, stage 1 of {len(stages)}" and len(stages) == len({s.stage for s in graph.sites})


def test_what_is_told_again_at_every_step_is_held_once(pipe, prompts):
    by = stream(pipe, prompts, batch_size=3)
    by({"transformer_blocks.0.attn.to_q"})
    assert len(by._calls) == 2 * CALL["num_inference_steps"]
    embeds = {id(call.arguments["encoder_hidden_states"]) for call in by._calls}
    assert len(embeds) == 2  # of two batches
    assert len({id(call.arguments["hidden_states"]) for call in by._calls}) == len(by._calls)


@pytest.mark.parametrize("layers", [1, 2])
def test_answers_that_are_read_again_are_kept(monkeypatch, layers):
    """The residual blocks of a UNet, whose answers come back as skip connections: SDXL has two in a row at first."""
    monkeypatch.setattr(unets, "_unet", partial(unets._unet, layers_per_block=layers))
    pipe, told, _ = of_family("sdxl")
    assert len(pipe.unet.down_blocks[0].resnets) == layers
    by = checked(pipe, told)
    obsdiff.prune(pipe, "unstructured:0.5", statistics=by)
    kept = {name for call in by._calls for name, answer in call.answers.items() if next(tensors_in(answer)).is_meta}
    assert not any(".resnets." in name for name in kept)


def test_what_it_changes_is_taken_back_when_it_fails(pipe, prompts):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    by = stream(pipe, prompts)
    measure = by.__call__

    class Failing(Stream):
        def __call__(self, sites):
            if any("blocks.1" in name for name in sites):
                raise RuntimeError("power cut")
            return measure(sites)

    by.__class__ = Failing
    with pytest.raises(RuntimeError, match="power cut"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=by)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_bad_requests(pipe, prompts):
    by = stream(pipe, prompts)
    for options, word in (
        ({"pattern": "structured:0.5+2:4"}, "one calibration of the dense model"),
        ({"pattern": "rank:0.5"}, "ranks are checked on the dense"),
        ({"pattern": "unstructured:0.5", "method": "taylor"}, "goes by loss_gradient of the whole denoiser"),
        ({"pattern": "unstructured:0.5", "packages": 2}, "leave out packages"),
    ):
        with pytest.raises(obsdiff.UserError, match=word):
            obsdiff.prune(pipe, options.pop("pattern"), statistics=by, **options)
    with pytest.raises(obsdiff.UserError, match="another pipeline"):
        obsdiff.prune(make_pipe(), "unstructured:0.5", statistics=by)
    with pytest.raises(obsdiff.UserError, match="measured on the whole denoiser"):
        stream(pipe, prompts, needs={"gates"})
    nowhere = PruningOptions(pattern="2:4", calibration=CalibrationOptions(streamed=True, calls_on_disk=True))
    with pytest.raises(obsdiff.UserError, match="calls_on_disk needs a folder"):
        prune_stage(pipe, nowhere, prompts)


def test_a_stage_that_runs_twice_is_refused(pipe, prompts):
    pipe.transformer.transformer_blocks[1] = pipe.transformer.transformer_blocks[0]
    asked = PruningOptions(pattern="2:4", calibration=CalibrationOptions(streamed=True))
    for way in (lambda: stream(pipe, prompts), lambda: prepare(pipe, asked)):  # the latter is before images are drawn
        with pytest.raises(obsdiff.UserError, match="runs a block more than once in a call; calibrate in packages"):
            way()


def test_the_whole_way(pipe_folder, tmp_path, capsys):
    arguments = [
        "prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), "--pattern", "unstructured:0.5",
        "--calibration.num_prompts", "4", "--evaluation.num_images", "2", "--calibration.streamed", "true",
    ]  # fmt: skip
    main(arguments)
    said = capsys.readouterr().err
    assert "guidance 2.0, stage by stage; Hessians take" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["streamed"] and report["layer_error"]["mean"] > 0
    main(["inspect", str(tmp_path / "out")])
    assert "log_decrease weights, stage by stage" in capsys.readouterr().out
    main([*arguments[:4], str(tmp_path / "disk"), *arguments[5:], "--calibration.calls_on_disk", "true"])
    same = json.loads((tmp_path / "disk" / "report.json").read_text())
    assert same["layer_error"] == report["layer_error"]
    assert {file.name for file in tmp_path.iterdir()} == {"out", "disk"}
    capsys.readouterr()
    for more, told in (
        (["--statistics", str(tmp_path / "s")], "a statistics folder cannot hold"),
        (["--calibration.packages", "2"], "leave out --calibration.packages"),
        (["--allocation", "measured"], "leave out --calibration.streamed, or give its plan.yaml"),
        (
            ["--method", "magnitude"],
            "magnitude measures nothing, so there are no calls; leave out --calibration.stream",
        ),
        (["--calibration.streamed", "false", "--calibration.calls_on_disk", "true"], "is of a streamed calibration's"),
        (
            ["--calibration.streamed", "false", "--calibration.packages", "2", "--method", "magnitude"],
            "magnitude measures nothing, so there are no passes; use --calibration.packages 1",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*arguments[:4], str(tmp_path / "no"), *arguments[5:], *more])
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_as_the_stage_before_a_recovery(pipe_folder, tmp_path):
    streamed = [f"--model.pruning.calibration.{name}=true" for name in ("streamed", "calls_on_disk")]
    fit(pipe_folder, tmp_path / "run", *streamed, steps=2)
    assert_zero(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "recovered" / "report.json").read_text())
    calls = denoiser_flops(subject_of(make_pipe()), CALL) * 2 * CALL["num_inference_steps"] * 4
    assert report["budget"]["used"]["calibration"]["denoiser_flops"] == 3 * calls  # recording, measuring, going on
    assert not (tmp_path / "run" / "statistics").exists()


class Killed(BaseException):
    pass


def prune_to(store, monkeypatch, pattern, dies_at=None, statistics=None):
    """Prune, or be killed after so many solves; weights, report, and how many solves and measurements there were."""
    from obsdiff.pruning import apply

    pipe = make_pipe()
    solved, measured = [], []

    def counted(real):
        def solve(*args):
            if len(solved) == dies_at:
                raise Killed
            solved.append(1)
            return real(*args)

        return solve

    class Counted(Stream):
        def __call__(self, sites):
            measured.append(1)
            return super().__call__(sites)

    if statistics is None:
        statistics = stream(pipe, digit_prompts()[:4])
        statistics.__class__ = Counted
    with monkeypatch.context() as patch:
        patch.setattr(apply, "solve_site", counted(apply.solve_site))
        patch.setattr(apply, "solve_groups", counted(apply.solve_groups))
        report = obsdiff.prune(pipe, pattern, statistics=statistics, solved=store, spare_blocks=())
    return dict(pipe.transformer.state_dict()), report, len(solved), len(measured)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", pytest.param("structured:0.5", marks=pytest.mark.slow)])
def test_a_killed_run_loses_one_stage_at_most(tmp_path, monkeypatch, pattern):
    weights, report, solves, stages = prune_to(tmp_path / "whole", monkeypatch, pattern)
    assert stages == 3 and not [note for note in report.notes if "cut off" in note]
    for dies_at in {1, solves // 2, solves - 1}:
        store = tmp_path / str(dies_at)
        with pytest.raises(Killed):
            prune_to(store, monkeypatch, pattern, dies_at)
        assert len(list(store.glob("*.safetensors"))) == dies_at
        found, again, left, measured = prune_to(store, monkeypatch, pattern)
        assert left == solves - dies_at and measured == 3 - dies_at * 3 // solves
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert again.masks.keys() == report.masks.keys() and again.layer_error == report.layer_error
        assert all(torch.equal(again.masks[name], mask) for name, mask in report.masks.items())
        assert again.fingerprint == report.fingerprint and again.refit_steps == report.refit_steps
        assert f"{dies_at} of its solves were taken over" in " ".join(again.notes)
    assert prune_to(store, monkeypatch, pattern)[2:] == (0, 0)
    (store / "000.safetensors").write_bytes(b"torn")
    assert prune_to(store, monkeypatch, pattern)[2] == 1
    other = "unstructured:0.6" if pattern.startswith("un") else "structured:0.25"
    assert prune_to(store, monkeypatch, other)[2] == solves  # nothing of another request is taken


def test_solves_from_kept_statistics_are_kept_too(prompts, tmp_path, monkeypatch):
    statistics = obsdiff.calibrate(make_pipe(), prompts, store=tmp_path / "statistics")
    with pytest.raises(Killed):
        prune_to(tmp_path / "solved", monkeypatch, "2:4", 5, statistics)
    found, _, left, _ = prune_to(tmp_path / "solved", monkeypatch, "2:4", None, statistics)
    weights, _, solves, _ = prune_to(None, monkeypatch, "2:4", None, statistics)
    assert left == solves - 5 and all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(obsdiff.UserError, match="only where statistics are measured already, or streamed"):
        prune_to(tmp_path / "no", monkeypatch, "2:4", None, lambda sites: statistics)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(obsdiff.UserError, match="mine"):
        prune_to(tmp_path / "mine", monkeypatch, "2:4", None, statistics)


def test_what_must_be_held_is_tried_out_without_holding_all(monkeypatch):
    held, forget = [], MadeCall.forget

    def watched(self, stages, passing):
        forget(self, stages, passing)
        held.append(sum(any(not tensor.is_meta for tensor in tensors_in(a)) for a in self.answers.values()))

    monkeypatch.setattr(MadeCall, "forget", watched)
    streamed = stream(make_pipe(blocks=6), digit_prompts()[:2])
    streamed.record()
    assert len(streamed._passing) == 5 and len(held) == 6 and max(held) == 1
