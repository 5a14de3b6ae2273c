"""Budgets by the clock on two processes: the first one's clock holds for both."""

import pytest
import torch

from obsdiff.callbacks.budget import Budget
from obsdiff.costs import Cost
from tests.training.common import ROOT, assert_same
from tests.training.test_several_processes import run_two


@pytest.mark.slow
def test_schedule_and_end_are_the_first_process_s(pipe_folder, tmp_path):
    run_two(ROOT / "tests" / "training" / "clocks.py", pipe_folder, tmp_path)
    for name in ("wall_s", "device_s"):
        (steps, rates, weights), (other_steps, other_rates, other_weights) = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert 7 <= steps == other_steps <= 9  # a second each by the first process's clock; by the other's it were 5
        assert rates == other_rates and rates[0] > rates[4] > rates[-1]
        assert_same(weights, other_weights)


class FakeModule:
    device = "cpu"
    batch_flops = 10.0
    budget_fraction = 0.0

    def cost_before(self):
        return {"calibration": Cost(denoiser_flops=5.0, wall_s=2.0)}


class FakeTrainer:
    world_size = 1
    global_step = 0
    accumulate_grad_batches = 1
    should_stop = False


@pytest.mark.parametrize("limits, steps", [({"denoiser_flops": 35.0}, 3), ({"images": 8}, 2), ({"steps": 5}, 5)])
def test_what_the_batches_cost_is_what_is_spent(limits, steps):
    budget, trainer, module = Budget(**limits), FakeTrainer(), FakeModule()
    budget.on_train_start(trainer, module)
    while not trainer.should_stop:
        trainer.global_step += 1
        budget.on_train_batch_end(trainer, module, None, {"image": torch.zeros(4, 1, 2, 2)}, 0)
    assert trainer.global_step == steps and module.budget_fraction == pytest.approx(1.0)
    assert budget.recovery.denoiser_flops == 10.0 * steps and budget.recovery.images == 4 * steps
