"""Options that no training can meet are refused in one line before anything is loaded or pruned."""

import math
from typing import Any

import pytest

from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.ema import EMA
from obsdiff.callbacks.samples import SampleGrid
from obsdiff.errors import UserError
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.training.options import Objective, Optimization, Trained
from obsdiff.training.recovery import Recovery
from tests.training.test_recovery import refused

NAN, INF = math.nan, math.inf
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"objective": Objective()}, "at least one positive"),
    *(({"objective": Objective(distill_output=w)}, "objective") for w in (NAN, INF, -1.0)),
    ({"objective": Objective(denoise=1.0, distill_features=NAN)}, "distill_features: nan"),
    *(({"trained": Trained(lora_rank=r)}, f"lora_rank is {r}") for r in (0, -1)),
    *(({"trained": Trained(lora_rank=4, lora_alpha=a)}, f"lora_alpha is {a}") for a in (NAN, INF, 0.0, -1.0)),
    *(({"optimization": Optimization(lr=lr)}, f"lr is {lr}") for lr in (NAN, INF, -1e-3, 0.0)),
    *(({"optimization": Optimization(weight_decay=d)}, f"weight_decay is {d}") for d in (NAN, INF, -0.1)),
    *(({"optimization": Optimization(betas=b)}, "betas") for b in ((0.9, 1.0), (-0.1, 0.9), (NAN, 0.9))),
    ({"optimization": Optimization(warmup_steps=-1)}, "warmup_steps is -1"),
    ({"optimization": Optimization(schedule="linear")}, "unknown schedule 'linear'"),
    ({"evaluation": EvaluationOptions(num_images=-1)}, "num_images is -1"),
    ({"evaluation": EvaluationOptions(batch_size=0)}, "batch_size is 0"),
    *(({"evaluation": EvaluationOptions(seed=s)}, "evaluation.seed") for s in (-1, 2**63, 2**63 - 2)),
    *(({"prompt_dropout": p}, "prompt_dropout is") for p in (NAN, -0.1, 1.1)),
    *(({"seed": s}, "model.seed is") for s in (-1, 2**63)),
]


@pytest.mark.parametrize("options, word", WRONG, ids=[f"{next(iter(o.values()))}" for o, _ in WRONG])
def test_options_that_no_training_can_meet(options, word, tmp_path):
    with pytest.raises(UserError) as found:
        Recovery("digits-sd3", str(tmp_path / "run"), **options)
    assert word in str(found.value) and "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["steps", "images", "denoiser_flops", "device_s", "wall_s"])
@pytest.mark.parametrize("limit", [NAN, INF, -INF, 0, -1])
def test_budgets_are_positive_and_finite(name, limit):
    with pytest.raises(UserError, match=rf"budget\.{name} is .*positive"):
        Budget(**{name: limit})


def test_callbacks_refuse_what_they_cannot_do():
    for decay in (NAN, 1.0, -0.1, INF):
        with pytest.raises(UserError, match="decay"):
            EMA(decay)
    with pytest.raises(UserError, match="update_every_n_steps is 0"):
        EMA(update_every_n_steps=0)
    with pytest.raises(UserError, match="shown is 0"):
        SampleGrid(0)


@pytest.mark.parametrize(
    "option, word",
    [
        ("--budget.wall_s=.inf", "budget.wall_s is inf"),
        ("--budget.wall_s=.nan", "budget.wall_s is nan"),
        ("--trainer.max_steps=0", "max_steps is 0"),
        ("--trainer.limit_train_batches=0", "limit_train_batches is 0"),
        ("--data.batch_size=0", "batch_size is 0"),
    ],
)
def test_the_command_line_refuses_in_one_line_before_it_prunes(option, word, pipe_folder, tmp_path, capsys):
    assert word in refused(capsys, pipe_folder, tmp_path / "run", *option.split())
    assert not (tmp_path / "run").exists()


def test_a_budget_that_calibration_will_use_up_is_refused_before_pruning(pipe_folder, tmp_path, capsys):
    line = refused(capsys, pipe_folder, tmp_path / "run", "--budget.denoiser_flops=1000")
    assert "less than what pruning will cost" in line
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"logs"}
