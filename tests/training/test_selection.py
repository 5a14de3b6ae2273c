"""What is trained, and how what was trained comes back, by the memory that stays."""

import sys
from pathlib import Path

import pytest
import torch

from obsdiff.models.subject import subject_of
from obsdiff.pruning.folder import load_pipeline
from obsdiff.training.options import Trained
from obsdiff.training.selection import choose_trained, load_trained

ADAPTED = Trained(lora_rank=2, frozen_dtype="bfloat16")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what a process has mapped")


def opened(folder):
    return subject_of(load_pipeline(folder, dtype="float32")).denoiser


def is_mapped(folder):
    """Whether this process maps the file of the denoiser's weights."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    return str(file.resolve()) in Path("/proc/self/maps").read_text(encoding="utf-8")


def state_of(denoiser):
    return {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}


@LINUX
def test_a_lora_on_rounded_weights_lets_their_file_go(pipe_folder):
    denoiser = opened(pipe_folder)
    buffers = {name: tensor.clone() for name, tensor in denoiser.named_buffers()}
    assert buffers and is_mapped(pipe_folder)
    choose_trained(denoiser, {}, ADAPTED)
    assert not is_mapped(pipe_folder)
    for name, tensor in denoiser.named_buffers():
        torch.testing.assert_close(tensor, buffers[name], rtol=0, atol=0)


@LINUX
@pytest.mark.parametrize("trained", [Trained(), ADAPTED], ids=["weights", "lora"])
def test_a_result_lets_the_file_go_that_it_was_loaded_from(pipe_folder, trained):
    student = opened(pipe_folder)
    choose_trained(student, {}, trained)
    state = {name: tensor.clone() for name, tensor in state_of(student).items()}
    del student
    denoiser = opened(pipe_folder)
    assert is_mapped(pipe_folder)
    load_trained(denoiser, state, {}, trained)
    assert not is_mapped(pipe_folder)
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_trained_weights_are_shared_and_not_copied(pipe_folder):
    state = {name: tensor + 1 for name, tensor in state_of(opened(pipe_folder)).items()}
    denoiser = opened(pipe_folder)
    load_trained(denoiser, state, {}, Trained())
    assert {name: t.data_ptr() for name, t in denoiser.state_dict().items()} == {
        n: t.data_ptr() for n, t in state.items()
    }


def test_trained_weights_in_another_dtype_come_back_in_float32(pipe_folder):
    state = {name: tensor.bfloat16() for name, tensor in state_of(opened(pipe_folder)).items()}
    denoiser = opened(pipe_folder)
    load_trained(denoiser, state, {}, Trained())
    for name, tensor in denoiser.state_dict().items():
        torch.testing.assert_close(tensor, state[name].float(), rtol=0, atol=0)
