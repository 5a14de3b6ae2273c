"""A name that is in no table is an error that lists the table, never a silent default."""

import pytest
import torch

from obsdiff.allocation.request import Budget, check_values, parse_budget
from obsdiff.criteria import GroupProblem, find_method
from obsdiff.criteria.structured import RULES, choose_groups
from obsdiff.diffusion.noising import DiffusionNoising
from obsdiff.models.told import Told
from obsdiff.obs.pattern import parse_pattern
from obsdiff.obs.structured import Consumer, fuse
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning.options import PruningOptions
from obsdiff.training.objectives import loss_terms

NOTHING, LAYER = torch.zeros(1), torch.nn.Identity()
GROUPS = GroupProblem([Consumer(torch.ones(2, 4))], [], 4, 1, 1, "reciprocal_rank", 0.01, 0)


@pytest.mark.parametrize(
    ("use", "known"),
    [
        (lambda name: choose_groups(name, GROUPS), list(RULES)),
        (lambda name: fuse([NOTHING], name), ["reciprocal_rank", "relative_error"]),
        (lambda name: timestep_weights(name, 4), ["log_decrease", "uniform"]),
        (lambda name: parse_pattern(f"{name}:0.5"), ["unstructured", "structured"]),
        (lambda name: parse_pattern(f"structured:{name}=0.5"), ["heads", "ffn"]),
        (find_method, ["obs", "sparsegpt", "random"]),
        (lambda name: check_values(PruningOptions(allocation=name)), ["uniform", "measured", "owl"]),
        (lambda name: parse_budget(f"{name}:0.5"), ["sparsity", "latency"]),
        (lambda name: Budget(name, 0.5), ["sparsity", "latency"]),
        (lambda name: DiffusionNoising(torch.ones(3), name), ["epsilon", "v_prediction", "sample"]),
        (
            lambda name: loss_terms(LAYER, None, {name: 1.0}, Told(NOTHING, NOTHING, {}), None, torch.Generator()),
            ["denoise"],
        ),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_what_there_is(use, known):
    with pytest.raises(ValueError, match="halff") as caught:
        use("halff")
    assert all(name in str(caught.value) for name in known)
