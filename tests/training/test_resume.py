"""``--ckpt_path``: goes on where something is left to do, says "finished" where not, and names what else there is."""

import json
import shutil
import zipfile

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.training import recovery, stage
from obsdiff.training.resume import check_resume, read_checkpoint
from tests.training.common import fit

TEXTS = {"missing": "does not exist", "folder": "is a folder", "registry:model": "litmodels", "best": "not known",
         "hpc": "no hpc_ckpt", "last": "no checkpoint in"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(pipe_folder, tmp_path_factory):
    """A run of four steps that ended."""
    output = tmp_path_factory.mktemp("finished") / "run"
    fit(pipe_folder, output, steps=4)
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Whoever loads or prunes a pipeline fails."""

    def loaded(*_, **__):
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(recovery, "start_from", loaded)
    monkeypatch.setattr(stage, "load_pipeline", loaded)


def refused(capsys, pipe_folder, output, *extra, **options):
    """The one line that a refused run prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        fit(pipe_folder, output, *extra, steps=4, **options)
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obsdiff")]
    return line


def steps_of(output):
    return json.loads((output / "recovered" / "report.json").read_text())["recovery"]["steps"]


def test_a_finished_run_says_so_and_loads_nothing(pipe_folder, run, capsys, nothing_loaded):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    fit(pipe_folder, run, "--ckpt_path=last", steps=4)
    said = capsys.readouterr().out
    assert "finished" in said and "step 4" in said and "--budget.steps" in said
    assert str(run / "recovered") in said and "sparsity 50.00%" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_a_finished_run_goes_on_when_the_budget_was_raised(pipe_folder, run, capsys):
    fit(pipe_folder, run, "--ckpt_path=last", steps=6)
    assert steps_of(run) == 6
    said = capsys.readouterr()
    assert "going on from step 4" in said.err and "6 of 6 steps" in said.out


def test_a_finished_run_without_its_result_writes_it(pipe_folder, run):
    shutil.rmtree(run / "recovered")
    fit(pipe_folder, run, "--ckpt_path=last", steps=4)
    assert steps_of(run) == 4


def test_half_a_result_is_not_finished(pipe_folder, run):
    shutil.rmtree(run / "recovered" / "pipeline")
    fit(pipe_folder, run, "--ckpt_path=last", steps=4)
    assert (run / "recovered" / "pipeline").exists()


def test_finished_is_not_said_of_another_request(pipe_folder, run, capsys):
    assert "other settings" in refused(capsys, pipe_folder, run, "--ckpt_path=last", pattern="2:4")


@pytest.mark.parametrize("asked", TEXTS)
def test_nothing_to_go_on_from(run, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    checkpoints, word = run / "checkpoints", TEXTS[asked]
    shutil.move(checkpoints / "last.ckpt", tmp_path / "elsewhere.ckpt")
    with pytest.raises(UserError, match=word) as refusal:
        check_resume(asked, [checkpoints], run, tmp_path, True)
    assert f"the pruned pipeline in {run / 'pruned'} is kept and is not pruned again" in str(refusal.value)
    assert "without --ckpt_path" in str(refusal.value)
    shutil.copyfile(tmp_path / "elsewhere.ckpt", checkpoints / "other.ckpt")
    with pytest.raises(UserError, match=word) as refusal:
        check_resume(asked, [checkpoints], run, tmp_path, True)
    assert f"there is {checkpoints / 'other.ckpt'}" in str(refusal.value)


def test_what_lightning_resolves_is_left_to_it(run, tmp_path):
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    for asked in ("hpc", "s3://bucket/last.ckpt"):
        assert check_resume(asked, [], run, tmp_path, True) is None


def test_a_folder_of_shards_is_known_by_its_index_and_the_rest(run, tmp_path):
    last, sharded = run / "checkpoints" / "last.ckpt", tmp_path / "last-before.ckpt"
    kept = torch.load(last, weights_only=True)
    sharded.mkdir()
    (sharded / ".metadata").touch()
    with pytest.raises(UserError, match=r"damaged: it has no meta.pt; there is"):
        check_resume(str(sharded), [last.parent], run, tmp_path, True)
    torch.save({key: value for key, value in kept.items() if key != "state_dict"}, sharded / "meta.pt")
    assert check_resume(str(sharded), [], run, tmp_path, True) == sharded
    assert check_resume("last", [tmp_path], run, tmp_path, True) == sharded  # where a kill left no other
    assert read_checkpoint(sharded)["global_step"] == kept["global_step"]
    torch.save({"global_step": 1, "obsdiff": {}}, sharded / "meta.pt")
    with pytest.raises(UserError, match="it has no callbacks, loops"):
        check_resume(str(sharded), [], run, tmp_path, True)


def test_what_the_user_trusts_is_checked_for_damage_only(run):
    last = run / "checkpoints" / "last.ckpt"
    torch.save(Code(), last)
    assert check_resume("last", [last.parent], run, run, True, trusted=True) == last
    truncated(last)
    with pytest.raises(UserError, match="damaged"):
        check_resume("last", [last.parent], run, run, True, trusted=True)


def test_last_without_a_checkpoint_stops_the_command(pipe_folder, tmp_path, capsys, nothing_loaded):
    line = refused(capsys, pipe_folder, tmp_path / "run", "--ckpt_path=last")
    assert "no checkpoint in" in line and str(tmp_path / "run" / "checkpoints") in line
    assert not (tmp_path / "run").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    """One bit in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def with_pickle(content):
    """A file as torch writes them around other pickled bytes."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return write


class Code:
    def __reduce__(self):
        return (print, ("this code ran",))


def changed(change):
    def write(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return write


DAMAGES = {
    "truncated": (truncated, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "garbage": (lambda path: path.write_bytes(b"\x80\x04K\x01." * 100), "damaged"),
    "flipped bit": (flipped, "checksum"),
    "text": (lambda path: path.write_text("hello"), "damaged"),
    "legacy pickle": (lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False), "damaged"),
    "another zip": (another_zip, "another kind"),
    "no pickle inside": (with_pickle(b"hello"), "damaged"),
    "empty pickle": (with_pickle(b""), "damaged"),
    "code": (lambda path: torch.save(Code(), path), "damaged"),
    "a list": (lambda path: torch.save([1], path), "another kind"),
    "weights only": (lambda path: torch.save({"weight": torch.ones(2)}, path), "state_dict"),
    "no state": (changed(lambda content: content.pop("state_dict")), "no state_dict"),
    "another module's": (changed(lambda content: content.pop("obsdiff")), "not of a recovery"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_seen(pipe_folder, run, kind, capsys):
    write, word = DAMAGES[kind]
    last = run / "checkpoints" / "last.ckpt"
    shutil.copyfile(last, other := run / "checkpoints" / "step-2.ckpt")
    assert check_resume("last", [last.parent], run, run, True) in (last, other)
    write(last)
    with pytest.raises(UserError, match=word) as refusal:
        check_resume(str(last), [last.parent], run, run, True)
    assert str(last) in str(refusal.value) and f"there is {other}" in str(refusal.value)
    other.unlink()
    with pytest.raises(UserError, match=word) as refusal:
        check_resume("last", [last.parent], run, run, True)
    assert "run fit without --ckpt_path" in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="run fit first"):
        check_resume("last", [last.parent], run, run, False)
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["last", "checkpoints/last.ckpt"])
def test_a_truncated_checkpoint_is_one_line_of_the_command(
    pipe_folder, run, capsys, nothing_loaded, asked, monkeypatch
):
    monkeypatch.chdir(run)
    truncated(run / "checkpoints" / "last.ckpt")
    assert "damaged" in refused(capsys, pipe_folder, run, f"--ckpt_path={asked}")
