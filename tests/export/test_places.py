"""Where a run's files go: checked before any work, and rescued when writing fails at the end."""

import errno
import json
import tempfile
from types import SimpleNamespace

import pytest

import obsdiff
from obsdiff import files
from obsdiff.export import places, run
from obsdiff.export.places import check_places, finite
from obsdiff.export.run import prune_run
from obsdiff.export.summary import prune_summary
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions
from obsdiff.pruning.plan import make_plan


def options(tmp_path, **more):
    given = {
        "pipeline": "tiny",
        "output": str(tmp_path / "out"),
        "pattern": "2:4",
        "calibration": CalibrationOptions(num_prompts=2),
        "evaluation": EvaluationOptions(num_images=0),
    }
    return PruneOptions(**(given | more))


@pytest.mark.parametrize("option", ["output", "statistics"])
def test_a_users_folder_is_refused_before_any_work(tmp_path, option):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(obsdiff.UserError, match="something else"):
        check_places(options(tmp_path, overwrite=True, **{option: str(tmp_path / "mine")}))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("option", ["output", "statistics", "sensitivity"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, option):
    (tmp_path / "file").write_text("")
    with pytest.raises(obsdiff.UserError, match=r"cannot write|not a folder"):
        check_places(options(tmp_path, **{option: str(tmp_path / "file" / "deep")}))


def test_folders_in_one_another_are_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(obsdiff.UserError, match=r"--statistics .* inside --output"):
        check_places(options(tmp_path, statistics=str(out / "stats")))
    with pytest.raises(obsdiff.UserError, match=r"--sensitivity .* inside --output"):
        check_places(options(tmp_path, sensitivity=str(out / "scan")))
    with pytest.raises(obsdiff.UserError, match="the same as"):
        check_places(options(tmp_path, statistics=str(tmp_path / "s"), sensitivity=str(tmp_path / "s")))


def test_overwriting_keeps_a_users_own_file(pipe, tmp_path):
    prune_run(pipe, options(tmp_path, method="magnitude"), quiet=True)
    (tmp_path / "out" / "pipeline" / "README.md").write_text("my notes")
    with pytest.raises(obsdiff.UserError, match=r"did not write, such as pipeline/README.md"):
        check_places(options(tmp_path, overwrite=True))
    assert (tmp_path / "out" / "pipeline" / "README.md").read_text() == "my notes"
    (tmp_path / "out" / "pipeline" / "README.md").unlink()
    check_places(options(tmp_path, overwrite=True))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_cannot_be_written_is_rescued(pipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    real, calls = run.write_pipeline, []

    def write_pipeline(*args):
        calls.append(1)
        real(*args) if len(calls) > 1 else full()

    monkeypatch.setattr(run, "write_pipeline", write_pipeline)
    with pytest.raises(obsdiff.UserError, match=r"No space left.*the finished run lies in .*elsewhere") as caught:
        prune_run(pipe, options(tmp_path), quiet=True)
    [rescued] = (tmp_path / "elsewhere").iterdir()
    assert str(rescued) in str(caught.value) and not (tmp_path / "out").exists()
    loaded = obsdiff.load_pipeline(rescued)
    assert all(
        (loaded.transformer.state_dict()[name] == value).all() for name, value in pipe.transformer.state_dict().items()
    )


def test_without_any_room_the_line_says_what_is_kept(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_pipeline", full)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    stats = str(tmp_path / "stats")
    with pytest.raises(obsdiff.UserError, match=r"kept are the calibration in .*stats, from which the same command"):
        prune_run(pipe, options(tmp_path, statistics=stats), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.solved", "elsewhere", "stats"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_figures_that_are_not_finite_become_null():
    found = finite({"a": [1.5, float("nan")], "b": {"c": float("-inf"), "d": 3, "e": "inf"}, "f": (float("inf"),)})
    assert json.dumps(found, allow_nan=False) == '{"a": [1.5, null], "b": {"c": null, "d": 3, "e": "inf"}, "f": [null]}'


def test_a_disk_without_room_for_the_pipeline_is_refused_before_any_work(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(run, "prune_stage", lambda *_, **__: pytest.fail("pruned"))
    with pytest.raises(obsdiff.UserError, match=r"its disk has 0 MiB left"):
        prune_run(pipe, options(tmp_path), quiet=True)


def test_a_stream_needs_room_for_its_solves_and_the_dense_weights_too(pipe, tmp_path, monkeypatch):
    room = run.pipeline_bytes(pipe) + 1000
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    monkeypatch.setattr(run, "prune_stage", lambda *_, **__: pytest.fail("pruned"))
    streamed = CalibrationOptions(num_prompts=2, streamed=True)
    with pytest.raises(obsdiff.UserError, match=r"takes about .* MiB, and its disk has"):
        prune_run(pipe, options(tmp_path, calibration=streamed), quiet=True)
    with pytest.raises(pytest.fail.Exception, match="pruned"):
        prune_run(pipe, options(tmp_path), quiet=True)


def test_room_for_what_each_process_puts_away_is_asked_for(pipe, monkeypatch):
    subject = subject_of(pipe)
    plan = make_plan(subject.graph, parse_pattern("unstructured:0.5"))
    alone = run._kept_meanwhile(subject, plan, True)
    monkeypatch.setattr(run, "world_size", lambda: 3)
    layers = [subject.graph.weight(layer).numel() for layer in plan.layers(subject.graph)]
    assert run._kept_meanwhile(subject, plan, True) - alone == 2 * sum(4 * n + -(-n // 8) for n in layers)
    assert run._kept_meanwhile(subject, plan, False) == 0


def test_prompts_that_cannot_be_measured_are_refused_before_any_work(pipe, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(run, "sample_shared", lambda *_, **__: pytest.fail("drew"))
    evaluation = EvaluationOptions(num_images=2, prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(obsdiff.UserError, match="'a cat' names no digit"):
        prune_run(pipe, options(tmp_path, evaluation=evaluation), quiet=True)


def test_a_prune_whose_images_are_not_finite_is_kept_all_the_same(pipe, tmp_path, monkeypatch):
    real, calls = run.sample_shared, []

    def sample_shared(*args):
        calls.append(1)
        images = real(*args)
        return images if len(calls) == 1 else images / 0

    monkeypatch.setattr(run, "sample_shared", sample_shared)
    with pytest.warns(UserWarning, match="not finite"):
        report = prune_run(pipe, options(tmp_path, evaluation=EvaluationOptions(num_images=2)), quiet=True)
    assert report["evaluation"]["pruned"]["mse"] is None
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    pruned = written["evaluation"]["pruned"]
    assert (
        pruned["alignment"] is None and pruned["not_finite"] == 2 and written["evaluation"]["dense"]["alignment"] >= 0
    )
    assert "not finite" in (tmp_path / "out" / "report.md").read_text()
    obsdiff.load_pipeline(tmp_path / "out")
    prune_summary(written, tmp_path / "out")
