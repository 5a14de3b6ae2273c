"""What is charged is what ran: recordings, and tensors of the sizes that were there."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import obsdiff
from obsdiff.callbacks.budget import Budget
from obsdiff.data.digits import DigitsDataModule
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.evaluation.flops import FlopCounts, denoiser_flops
from obsdiff.models.calling import call_denoiser
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.training.adapters import add_adapters
from obsdiff.training.options import Objective
from tests.conftest import CALL, make_pipe
from tests.training.test_plain_trainer import recovery, trainer


def inputs(count=2, side=8, tokens=20):
    embeds = {"encoder_hidden_states": torch.randn(count, tokens, 16), "pooled_projections": torch.randn(count, 16)}
    return torch.randn(count, 4, side, side), torch.rand(count) * 1000, embeds


@pytest.mark.parametrize("count, side, tokens", [(1, 8, 20), (3, 8, 20), (2, 4, 20), (2, 8, 7)])
def test_flops_are_those_of_the_tensors_that_run(pipe, count, side, tokens):
    latents, times, embeds = inputs(count, side, tokens)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        call_denoiser(pipe.transformer, latents, times, embeds)
    counts = FlopCounts(pipe.transformer)
    assert counts(latents, embeds) == counter.get_total_flops() == counts(latents, embeds)
    assert pipe.transformer.proj_out.weight.device.type == "cpu"  # the copy went to the meta device, not the model


def test_nominal_sizes_count_as_before(pipe):
    latents, _, embeds = inputs(1)
    nominal = denoiser_flops(subject_of(pipe), CALL)
    assert FlopCounts(pipe.transformer)(latents, embeds) == nominal
    latents, _, embeds = inputs(5)
    assert FlopCounts(pipe.transformer)(latents, embeds) == 5 * nominal


def test_a_call_of_another_size_counts_its_own_latents(pipe):
    small = {**CALL, "height": 8, "width": 16}
    latents, _, embeds = inputs(1)
    assert denoiser_flops(subject_of(pipe), small) == FlopCounts(pipe.transformer)(latents[:, :, :4], embeds)


def test_adapters_count(pipe):
    latents, _, embeds = inputs()
    plain = FlopCounts(pipe.transformer)(latents, embeds)
    layer = "transformer_blocks.0.ff.net.2"
    masks = {layer: torch.rand_like(pipe.transformer.get_submodule(layer).weight) > 0.5}
    add_adapters(pipe.transformer, [layer], masks, rank=2, alpha=2.0)
    rows, columns = masks[layer].shape
    assert FlopCounts(pipe.transformer)(latents, embeds) - plain == 2 * 2 * rows * columns


def spent(pipe_folder, tmp_path, data, **changes):
    budget = Budget(steps=2)
    module = recovery(pipe_folder, tmp_path / "run", **changes)
    trainer(tmp_path, max_steps=-1, callbacks=[budget]).fit(module, datamodule=data)
    return budget.report()["used"]


@pytest.mark.slow
def test_a_recording_is_charged_also_when_it_is_used_again(pipe_folder, tmp_path):
    def data():
        return TrajectoryDataModule(
            str(pipe_folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4
        )

    distil = {"objective": Objective(distill_output=1.0)}
    first = spent(pipe_folder, tmp_path / "first", data(), **distil)
    second = spent(pipe_folder, tmp_path / "second", data(), **distil)
    pipe = obsdiff.load_pipeline(pipe_folder)
    nominal = denoiser_flops(subject_of(pipe), call_arguments(pipe))
    assert first["recording"] == second["recording"]
    assert first["recording"]["denoiser_flops"] == 4 * 3 * 2 * nominal  # prompts, steps, rows with guidance
    assert 0 < first["recording"]["wall_s"] == first["recording"]["device_s"]
    assert first["recovery"]["denoiser_flops"] == 2 * 4 * 3 * nominal  # steps, batch, the student's passes


def test_images_of_another_size_than_the_models_own_are_charged_as_they_are(tmp_path):
    from obsdiff.files import write_json
    from obsdiff.models.info import INFO_FILE

    pipe = make_pipe(image_size=32)  # trained below on images of 16
    pipe.save_pretrained(tmp_path / "large")
    write_json(tmp_path / "large" / INFO_FILE, {"call": {**CALL, "height": 32, "width": 32}})
    used = spent(tmp_path / "large", tmp_path, DigitsDataModule(batch_size=4))
    latents, _, embeds = inputs(4)
    assert used["recovery"]["denoiser_flops"] == 2 * 3 * FlopCounts(pipe.transformer)(latents, embeds)
