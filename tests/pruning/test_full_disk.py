"""A disk that takes no more in the middle of a store: one line, nothing torn, and what was whole before is gone on
from."""

import errno
import os
from pathlib import Path

import pytest
import torch

import obsdiff
from obsdiff.pruning import calibrate as module
from obsdiff.pruning import kept
from obsdiff.pruning.stream import stream
from tests.conftest import make_pipe
from tests.obs.same import same_sums

PROMPTS = ["a seven", "a two", "a handwritten digit nine", "a one"]


class Disk:
    """Takes so many files, and half of the next one."""

    def __init__(self, files):
        self.files = files

    def write(self, real, path, content, *args):
        self.files -= 1
        if self.files < 0:
            real(path, content[: len(content) // 2], *args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, content, *args)


def limited(patch, files):
    disk, write_bytes, write_text = Disk(files), Path.write_bytes, Path.write_text
    patch.setattr(Path, "write_bytes", lambda path, content: disk.write(write_bytes, path, content))
    patch.setattr(Path, "write_text", lambda path, text, encoding: disk.write(write_text, path, text, encoding))


def full(place):
    return f"cannot write {place}: {os.strerror(errno.ENOSPC)}; choose another place or free some space"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def calibrate(store):
    return obsdiff.calibrate(make_pipe(), PROMPTS, batch_size=1, store=store)


@pytest.fixture(scope="module")
def whole():
    return obsdiff.calibrate(make_pipe(), PROMPTS, batch_size=1)


@pytest.fixture(scope="module")
def sites(whole):
    return len(list(whole))


@pytest.mark.parametrize("at", ["first file", "a site", "the index"])
def test_in_the_middle_of_a_store(tmp_path, monkeypatch, whole, sites, at):
    store = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(obsdiff.UserError) as refused:
        limited(patch, {"first file": 0, "a site": 7, "the index": sites}[at])
        calibrate(store)
    assert str(refused.value) == full(store / "statistics.json" if at == "the index" else store)
    assert names(tmp_path) == []
    again = calibrate(store)
    assert all(same_sums(again.site(name), whole.site(name)) for name in whole)


@pytest.mark.parametrize("files", [4, "the index"])
def test_in_the_middle_of_what_a_calibration_has_so_far(tmp_path, monkeypatch, whole, sites, files):
    """The third of its stores does not fit; the second one stays, and is what the next run begins with."""
    store = tmp_path / "store"
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patch, pytest.raises(obsdiff.UserError) as refused:
        limited(patch, 2 * (sites + 2) + (sites if files == "the index" else files))
        calibrate(store)
    there = tmp_path / "store.unfinished"
    assert str(refused.value) == full(there / "statistics.json" if files == "the index" else there)
    assert names(tmp_path) == ["store.unfinished"]
    begun = []
    real = module._measure

    def measure(subject, sites, told, settings, statistics, *rest):
        begun.append(list(statistics.prompts))
        real(subject, sites, told, settings, statistics, *rest)

    monkeypatch.setattr(module, "_measure", measure)
    again = calibrate(store)
    assert begun == [[0, 1]] and names(tmp_path) == ["store"]
    assert all(same_sums(again.site(name), whole.site(name)) for name in whole)


def test_in_the_middle_of_a_solve_that_is_kept(tmp_path, monkeypatch):
    """Nothing of the denoiser has changed, and the next run solves only what is missing, to the same weights."""

    def prune(pipe, folder):
        return obsdiff.prune(pipe, "unstructured:0.5", statistics=stream(pipe, PROMPTS), solved=folder, spare_blocks=[])

    real, saved = kept.save_file, []

    def save_file(tensors, path, said):
        real(tensors, path, said)
        saved.append(path)
        if len(saved) == 6:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pipe, solved = make_pipe(), tmp_path / "solved"
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with (
        monkeypatch.context() as patch,
        pytest.raises(obsdiff.UserError, match=r"^cannot write .*\d\.safetensors: No space"),
    ):
        patch.setattr(kept, "save_file", save_file)
        prune(pipe, solved)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert len(list(solved.glob("*.safetensors"))) == 5 and len(names(solved)) == 6  # and the index
    report = prune(pipe, solved)
    assert "5 of its solves were taken over" in " ".join(report.notes)
    other = make_pipe()
    prune(other, tmp_path / "other")
    assert all(torch.equal(other.transformer.state_dict()[n], t) for n, t in pipe.transformer.state_dict().items())
