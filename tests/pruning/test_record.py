"""Recordings of trajectories: shards as they are drawn, and what a run that was cut off leaves to the next."""

import functools
import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from obsdiff.errors import UserError
from obsdiff.files import read_json
from obsdiff.models.calling import stacked
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning import record
from obsdiff.pruning.columns import Column, write_columns
from obsdiff.pruning.kept import KeptParts
from obsdiff.pruning.record import INDEX, TENSORS, open_trajectories, record_trajectories
from obsdiff.pruning.recorder import Recorder
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories, seen_calls
from tests.conftest import make_pipe

WORK = ".kept.recording"


@pytest.fixture(scope="module")
def prompts():
    return ["a seven", "the digit two", "three", "a photo of a zero", "nine"]


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """Tensors of a recording in batches of two that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "kept"
    record_trajectories(make_pipe(), prompts, folder, batch_size=2)
    return load_file(folder / TENSORS)


def assert_same(folder, wanted):
    found = load_file(folder / TENSORS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Drawn(list):
    """The first noise seed of every batch that was drawn; ``last``: how many may be."""

    last = None


@pytest.fixture
def drawn(monkeypatch):
    real, found = record.run_trajectories, Drawn()

    def watched(subject, conditioning, seeds, *rest):
        if len(found) == found.last:
            raise ZeroDivisionError
        found.append(seeds[0])
        return real(subject, conditioning, seeds, *rest)

    monkeypatch.setattr(record, "run_trajectories", watched)
    return found


def cut_off(drawn, prompts, tmp_path, after=2, **options):
    """A recording of three batches of which so many are drawn."""
    drawn.last = after
    with pytest.raises(ZeroDivisionError):
        record_trajectories(make_pipe(), prompts, tmp_path / "kept", **{"batch_size": 2, **options})
    assert not (tmp_path / "kept").exists()
    assert len(list((tmp_path / WORK).glob("*.safetensors"))) == after
    drawn.clear()
    drawn.last = None


def test_shards_together_are_what_one_pass_gives(whole, prompts):
    """All batches held, then put together: what was done before there were shards."""
    pipe = make_pipe()
    subject, call = subject_of(pipe), call_arguments(pipe)
    told = encode_prompts(pipe, prompts, call)
    recorder, latents, answers, negative = Recorder(subject, told), [], [], []
    with seen_calls(subject, recorder.see, recorder.hear), torch.no_grad():
        for _ in run_trajectories(subject, told, noise_seeds(0, 5), 2, call, recorder.begin):
            latents.append(torch.stack([sample for sample, _, _ in recorder.seen], dim=1))
            answers.append(torch.stack([heard[""] for heard in recorder.heard], dim=1))
            negative.append(torch.stack([heard["negative_"] for heard in recorder.heard], dim=1))
    assert torch.equal(whole["latents"], torch.cat(latents)) and len(whole["latents"]) == 5
    assert torch.equal(whole["answers"], torch.cat(answers))
    assert torch.equal(whole["negative_answers"], torch.cat(negative))
    assert torch.equal(whole["times"], torch.cat([at for _, at, _ in recorder.seen]))
    embeds = recorder.embeds()
    assert {name for name in whole if name.startswith("embeds.")} == {f"embeds.{name}" for name in embeds}
    for name, tensor in embeds.items():
        assert torch.equal(whole[f"embeds.{name}"], tensor[:1] if name.startswith("negative_") else tensor)


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(whole, drawn, prompts, tmp_path, after):
    cut_off(drawn, prompts, tmp_path, after)
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=2)
    assert drawn == noise_seeds(0, 5)[2 * after :: 2]
    assert_same(tmp_path / "kept", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_earlier_runs_took_is_counted(drawn, prompts, tmp_path):
    cut_off(drawn, prompts, tmp_path)
    for file in (tmp_path / WORK).glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            said = content.metadata()
        save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file, said | {"time_s": "1000"})
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=2)
    found = open_trajectories(tmp_path / "kept")
    assert 2000 < found.time_s < 3000 and found.processes == 1


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty"])
def test_a_damaged_shard_is_drawn_again(whole, drawn, prompts, tmp_path, damage):
    cut_off(drawn, prompts, tmp_path)
    file = tmp_path / WORK / "000.safetensors"
    content = file.read_bytes()
    file.write_bytes({"torn": content[:-1], "garbage": b"?" * len(content), "empty": b""}[damage])
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=2)
    assert drawn == [noise_seeds(0, 5)[at] for at in (0, 4)]
    assert_same(tmp_path / "kept", whole)


@pytest.mark.parametrize("other", [{"seed": 3}, {"steps": 2}, {"batch_size": 1}, {"guidance_scale": 1.0}])
def test_shards_of_another_request_are_never_used(whole, drawn, prompts, tmp_path, other):
    cut_off(drawn, prompts, tmp_path, **other)
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=2)
    assert len(drawn) == 3
    assert_same(tmp_path / "kept", whole)
    assert not (tmp_path / WORK).exists()


def test_shards_of_another_model_are_never_used(whole, drawn, prompts, tmp_path):
    pipe = make_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1
    drawn.last = 2
    with pytest.raises(ZeroDivisionError):
        record_trajectories(pipe, prompts, tmp_path / "kept", batch_size=2)
    drawn.clear()
    drawn.last = None
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=2)
    assert len(drawn) == 3
    assert_same(tmp_path / "kept", whole)


def test_a_batch_size_changes_speed_and_memory_alone(whole, prompts, tmp_path):
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=3)
    found = load_file(tmp_path / "kept" / TENSORS)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_in_the_batches_of_all(monkeypatch, prompts, tmp_path):
    """Of the text encoders, too, the last bits depend on who shares a batch: not on the recording's, nor on what an
    earlier run has drawn; and what is encoded is no more than the batches around it."""
    monkeypatch.setattr(record, "ENCODE_BATCH", 2)
    monkeypatch.setattr("obsdiff.models.conditioning.ENCODE_BATCH", 2)
    asked, real = [], record.encode_prompts
    monkeypatch.setattr(
        record, "encode_prompts", lambda pipe, given, call: (asked.append(given), real(pipe, given, call))[1]
    )
    pipe = make_pipe()
    call = call_arguments(pipe)
    wanted = encode_prompts(pipe, prompts, call)
    told = record._Encoded(pipe, prompts, call)
    for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 4), slice(4, 5)):
        found = told(part)
        assert len(found) == part.stop - part.start
        assert all(torch.equal(found.embeds[name], tensor) for name, tensor in wanted[part].embeds.items())
        assert torch.equal(found.text_mask, wanted.text_mask[part])
    assert asked == [prompts[:2], prompts[2:4], prompts[:4], prompts[4:]]


def test_no_more_than_one_batch_is_held(monkeypatch, prompts, tmp_path):
    real, held, most = KeptParts.write, [], []

    @functools.wraps(real)
    def watched(self, name, tensors, *args, **given):
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        gc.collect()
        most.append(sum(tensor() is not None for tensor in held) - len(tensors))
        real(self, name, tensors, *args, **given)

    monkeypatch.setattr(KeptParts, "write", watched)
    record_trajectories(make_pipe(), prompts, tmp_path / "kept", batch_size=1)
    assert most == [0] * 5


def test_what_somebody_else_has_put_there_is_kept(prompts, tmp_path):
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "000.safetensors").write_text("mine")
    with pytest.raises(
        UserError, match=r"kept\.recording exists and holds something else than an unfinished recording"
    ):
        record_trajectories(make_pipe(), prompts, tmp_path / "kept")
    assert (tmp_path / WORK / "000.safetensors").read_text() == "mine"


def test_shards_that_another_run_takes_away_are_missed(monkeypatch, prompts, tmp_path):
    real = KeptParts.write

    def watched(self, name, *args, **given):
        real(self, name, *args, **given)
        (tmp_path / WORK / "000.safetensors").unlink()

    monkeypatch.setattr(KeptParts, "write", watched)
    with pytest.raises(UserError, match="has lost 1 of its shards to another run; record in one run at a time"):
        record_trajectories(make_pipe(), prompts[:2], tmp_path / "kept", batch_size=2)
    assert not (tmp_path / "kept").exists()


# ---- together


def joined(shards, tmp_path):
    write_columns(tmp_path / "file", record._joined(lambda: iter(shards)))
    return load_file(tmp_path / "file")


def shard(rows, length, negative, **more):
    """Told something of ragged length."""
    own = torch.arange(rows * length * 2.0).view(rows, length, 2) + 1
    told = {"embeds.x": own, "embeds.negative_x": torch.full((1, negative, 2), 7.0)}
    return {
        "latents": torch.randn(rows, 3, 2),
        "answers": torch.randn(rows, 3, 2),
        "times": torch.rand(3),
        **told,
        **more,
    }


def test_ragged_rows_are_padded_to_the_longest(tmp_path):
    shards = [shard(2, 4, 3), shard(1, 6, 3), shard(2, 5, 3)]
    found = joined(shards, tmp_path)
    assert torch.equal(found["embeds.x"], stacked([part["embeds.x"] for part in shards]))
    assert torch.equal(found["embeds.negative_x"], shards[0]["embeds.negative_x"])
    assert torch.equal(found["times"], shards[-1]["times"])
    uneven = [shard(2, 4, 3), shard(1, 6, 2)]
    found = joined(uneven, tmp_path)["embeds.negative_x"]
    assert found.shape == (3, 3, 2) and torch.equal(
        found, stacked([torch.full((2, 3, 2), 7.0), torch.full((1, 2, 2), 7.0)])
    )


def test_masks_of_some_prompts_may_be_bool(tmp_path):
    """As where none of a batch is padded."""
    masks = torch.tensor([[1, 0], [1, 1]]), torch.ones(1, 2, dtype=torch.bool)
    found = joined([shard(len(mask), 4, 3, **{"embeds.mask": mask}) for mask in masks], tmp_path)
    assert torch.equal(found["embeds.mask"], torch.cat(masks)) and found["embeds.mask"].dtype == torch.int64


def test_shards_that_do_not_fit_together_are_refused(tmp_path):
    one, other = shard(2, 4, 3), shard(1, 4, 3)
    other["latents"] = torch.randn(1, 2, 2)
    with pytest.raises(UserError, match="latents of some prompts is missing or of another shape"):
        joined([one, other], tmp_path)
    with pytest.raises(UserError, match=r"embeds\.y of some prompts is missing"):
        joined([one, shard(1, 4, 3, **{"embeds.y": torch.zeros(1, 2)})], tmp_path)


def test_negative_answers_of_some_prompts_only_are_left_out(tmp_path):
    found = joined([shard(2, 4, 3, negative_answers=torch.zeros(2, 3, 2)), shard(1, 4, 3)], tmp_path)
    assert "negative_answers" not in found and len(found["answers"]) == 3


def test_a_file_in_pieces_is_the_file_of_the_whole(tmp_path):
    whole = {
        "half": torch.randn(5, 3).bfloat16(),
        "mask": torch.rand(5, 7) > 0.5,
        "number": torch.tensor(3),
        "one": torch.tensor([5]).expand(1),
        "same": torch.tensor([6]).expand(5),
        "none": torch.empty(0, 4),
        "x": torch.randn(5, 2, 2),
    }
    columns = {
        name: Column(t.dtype, t.shape, functools.partial(iter, t.split(2) if t.dim() else (t,)))
        for name, t in whole.items()
    }
    write_columns(tmp_path / "pieces", columns)
    save_file({name: tensor.clone() for name, tensor in whole.items()}, tmp_path / "whole")
    found = load_file(tmp_path / "pieces")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert (tmp_path / "pieces").stat().st_size == (tmp_path / "whole").stat().st_size


def test_a_recording_is_mapped_not_read(prompts, tmp_path):
    """What is opened takes no memory of its own: a change in the file shows."""
    record_trajectories(make_pipe(), prompts[:2], tmp_path / "kept")
    found = open_trajectories(tmp_path / "kept")
    with (tmp_path / "kept" / TENSORS).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(size))["latents"]["data_offsets"]
        file.seek(8 + size + start)
        file.write(torch.tensor([12345.0]).numpy().tobytes())
    assert float(found.latents.flatten()[0]) == 12345.0
    assert read_json(tmp_path / "kept" / INDEX, "a recording")["files"] == [INDEX, TENSORS]
