"""What is trained, and how what was trained comes back, by the memory that stays."""

import gc
import shutil
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


@pytest.fixture
def own_folder(pipe_folder, tmp_path):
    """A copy that no other test has open."""
    return Path(shutil.copytree(pipe_folder, tmp_path / "pipeline"))


def is_mapped(folder):
    """Whether this process maps the file of the denoiser's weights."""
    gc.collect()
    (file,) = (folder / "transformer").glob("*.safetensors")
    return str(file.resolve()) in Path("/proc/self/maps").read_text(encoding="utf-8")


def state_of(denoiser):
    return {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}


@LINUX
def test_a_lora_on_rounded_weights_lets_their_file_go(own_folder):
    denoiser = opened(own_folder)
    buffers = {name: tensor.clone() for name, tensor in denoiser.named_buffers()}
    assert buffers and is_mapped(own_folder)
    choose_trained(denoiser, {}, ADAPTED)
    assert not is_mapped(own_folder)
    for name, tensor in denoiser.named_buffers():
        torch.testing.assert_close(tensor, buffers[name], rtol=0, atol=0)


@LINUX
@pytest.mark.parametrize("trained", [Trained(), ADAPTED], ids=["weights", "lora"])
def test_a_result_lets_the_file_go_that_it_was_loaded_from(own_folder, trained):
    student = opened(own_folder)
    choose_trained(student, {}, trained)
    state = {name: tensor.clone() for name, tensor in state_of(student).items()}
    del student
    denoiser = opened(own_folder)
    assert is_mapped(own_folder)
    load_trained(denoiser, state, {}, trained)
    assert not is_mapped(own_folder)
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


@torch.no_grad()
def test_a_merged_result_leaves_what_it_was_merged_from(pipe_folder):
    """Its base weights are shared until each is merged."""
    trained, layer = Trained(lora_rank=2, lora_alpha=3.0), "transformer_blocks.0.ff.net.2"
    student = opened(pipe_folder)
    mask = torch.rand(student.get_submodule(layer).weight.shape) > 0.5
    choose_trained(student, {layer: mask}, trained)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter))
    state = state_of(student)
    before = {name: tensor.clone() for name, tensor in state.items()}
    denoiser = opened(pipe_folder)
    load_trained(denoiser, state, {layer: mask}, trained)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    change = before[f"{layer}.lora_B.recovery.weight"] @ before[f"{layer}.lora_A.recovery.weight"] * 3 / 2
    wanted = before[f"{layer}.base_layer.weight"] + mask * change
    torch.testing.assert_close(denoiser.get_submodule(layer).weight, wanted)


def test_a_state_of_another_model_is_refused_by_name(pipe_folder):
    denoiser = opened(pipe_folder)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*strange"):
        load_trained(denoiser, state_of(denoiser) | {"strange": torch.zeros(1)}, {}, Trained())
