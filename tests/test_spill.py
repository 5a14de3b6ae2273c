"""Tensors on a disk: dense weights that a prune may have to put back, masks, and what stages have answered."""

import copy
import errno
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.pruning.masks import Masks, load_masks, save_masks
from obsdiff.pruning.solved import remove_solved
from obsdiff.pruning.surgery import undone_on_error
from obsdiff.spill import Spill
from tests.conftest import make_pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_parameters_come_back_bit_by_bit(tmp_path, dtype):
    values = [
        torch.randn(3, 5).T.to(dtype),
        torch.randn(4).to(dtype),
        torch.empty(0, 2).to(dtype),
        torch.ones(()).to(dtype),
    ]
    spill = Spill(tmp_path / "new")
    there = [spill.put(nn.Parameter(value, requires_grad=False)) for value in values]
    trained = spill.put(nn.Parameter(torch.ones(2)))
    assert not list((tmp_path / "new").iterdir())  # nothing that a killed process leaves
    for value, spilled in zip(values, there, strict=True):
        back = spill.take(spilled)
        assert back.dtype == dtype and back.shape == value.shape and not back.requires_grad
        assert back.tolist() == value.tolist()
    assert spill.take(trained).requires_grad


def test_a_tensor_comes_back_laid_out_as_it_was(tmp_path):
    """What reads it may round otherwise, by its strides."""
    spill = Spill(tmp_path)
    turned = torch.randn(2, 3, 4).permute(2, 0, 1)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (turned, images, torch.randn(3, 1).expand(3, 4)):
        back = spill.take(spill.put(tensor))
        assert torch.equal(back, tensor) and back.stride() == tensor.clone().stride()


def test_places_that_were_released_are_taken_again(tmp_path):
    spill = Spill(tmp_path)
    kept, gone, other = spill.put(torch.ones(4)), spill.put(torch.ones(4)), spill.put(torch.ones(6))
    end = spill._end
    spill.release(gone)
    assert spill.put(torch.zeros(6)).offset == end  # no such place is free
    taken = spill.put(torch.arange(4.0))
    assert taken.offset == gone.offset and spill.put(torch.zeros(4)).offset != gone.offset
    assert [spill.take(t).tolist() for t in (kept, taken, other)] == [[1] * 4, [0, 1, 2, 3], [1] * 6]


def test_what_is_cut_off_is_no_weight(tmp_path):
    spill = Spill(tmp_path)
    spilled = spill.put(nn.Parameter(torch.ones(10)))
    spill._file.truncate(12)
    with pytest.raises(OSError, match="12 of 40 bytes"):
        spill.take(spilled)


def test_replaced_weights_leave_memory_and_come_back(tmp_path):
    layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    dense = weakref.ref(layer.weight)
    with pytest.raises(KeyboardInterrupt), undone_on_error(tmp_path) as edits:
        edits.set_weight(layer, torch.zeros(2, 4))
        edits.shift_bias(layer, torch.ones(3))
        gc.collect()
        assert dense() is None
        raise KeyboardInterrupt
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_a_full_disk_is_told_and_nothing_changes(tmp_path, prompts, monkeypatch):
    class Full:
        def __init__(self, file):
            self.seek, self.readinto, self.close = file.seek, file.readinto, file.close

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pipe = make_pipe()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    statistics = obsdiff.calibrate(pipe, prompts)
    real, put = Spill.put, []

    def put_until_full(self, parameter):
        put.append(parameter)
        if len(put) == 4:
            self._file = Full(self._file)
        return real(self, parameter)

    monkeypatch.setattr(Spill, "put", put_until_full)
    with pytest.raises(obsdiff.UserError, match=r"cannot write .*solved: No space left"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics, solved=tmp_path / "solved")
    assert len(put) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_what_was_put_away_before_a_disk_was_full_can_be_read(tmp_path):
    """A disk that really takes no more: what it refused must not wait in a buffer, and fail what is read next."""
    code = """
import resource, sys
from pathlib import Path
import torch
from obsdiff.errors import UserError
from obsdiff.spill import Spill

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
spill = Spill(Path(sys.argv[1]))
first, empty = spill.put(torch.arange(1000.0)), spill.put(torch.empty(0, 3))
try:
    spill.put(torch.arange(1800.0))
    raise AssertionError("it was written")
except UserError as error:
    print(error)
assert torch.equal(spill.take(first), torch.arange(1000.0)) and spill.take(empty).shape == (0, 3)
assert torch.equal(spill.take(spill.put(torch.arange(1200.0))), torch.arange(1200.0))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"cannot write {tmp_path}: File too large; choose another place or free some space\n"
    assert not list(tmp_path.iterdir())


def test_masks_are_held_in_bits():
    masks = Masks()
    whole = torch.rand(7, 9) < 0.5
    masks["a"] = whole
    masks.update({"b": torch.ones(3, dtype=torch.bool)})
    assert list(masks) == ["a", "b"] and torch.equal(masks["a"], whole) and masks["a"].dtype == torch.bool
    assert sum(packed.nbytes for packed, _ in masks._packed.values()) == 8 + 1
    del masks["a"]
    assert dict(masks).keys() == {"b"}


def test_masks_on_a_disk_are_the_same_and_take_no_memory(tmp_path):
    torch.manual_seed(0)
    values = {"a": torch.rand(7, 9) < 0.5, "b": torch.ones(3) > 0, "c": torch.empty(0, 4) > 0}
    masks = Masks(values, Spill(tmp_path))
    masks["a"] = values["a"] = ~values["a"]  # read again as it was written last
    masks.move_to_end("a")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(masks[name], value) for name, value in values.items())
    assert not any(isinstance(bits, torch.Tensor) for bits, _ in masks._packed.values())
    copied = pickle.loads(pickle.dumps(masks))
    assert isinstance(copied, Masks) and all(torch.equal(copied[name], value) for name, value in values.items())
    assert list(copy.deepcopy(masks)) == list(masks)
    save_masks(masks, tmp_path / "masks.safetensors")
    found = load_masks(tmp_path / "masks.safetensors")
    assert found.keys() == values.keys() and all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.3"])
def test_masks_wait_where_solves_are_kept(tmp_path, prompts, pattern):
    there, kept = make_pipe(), make_pipe()
    solved = tmp_path / "new" / "solved"
    in_memory = obsdiff.prune(there, pattern, statistics=obsdiff.calibrate(there, prompts)).masks
    on_disk = obsdiff.prune(kept, pattern, statistics=obsdiff.calibrate(kept, prompts), solved=solved).masks
    assert on_disk._spill is not None and in_memory._spill is None
    remove_solved(solved)
    assert not list(solved.parent.iterdir())
    assert list(on_disk) == list(in_memory) and all(torch.equal(on_disk[n], mask) for n, mask in in_memory.items())


def test_what_cannot_be_put_back_is_said_and_the_rest_is(tmp_path, monkeypatch):
    """No memory for one of the old weights: not an error that a run with smaller batches follows on."""
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    bias = second.bias.detach().clone()
    take = Spill.take

    def short(self, spilled, device):
        if spilled.offset == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(self, spilled, device)

    monkeypatch.setattr(Spill, "take", short)
    with (
        pytest.raises(obsdiff.UserError, match=r"1 dense weights could not be put back \(CUDA out of memory\); load"),
        undone_on_error(tmp_path) as edits,
    ):
        edits.set_weight(first, torch.zeros(3, 4))
        edits.shift_bias(second, torch.ones(3))
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert torch.equal(second.bias, bias)


def test_only_what_was_there_first_is_put_away(tmp_path):
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), undone_on_error(tmp_path) as edits:
        for _ in range(3):
            edits.set_weight(layer, torch.zeros(3, 4))
        assert edits._spill._end == weight.nbytes
        raise ZeroDivisionError
    assert torch.equal(layer.weight, weight)
