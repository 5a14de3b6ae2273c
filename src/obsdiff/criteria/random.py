"""Random: scores drawn from each layer's own seed, the same on every device."""

import torch

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.select import keep_best


def solve(problem: Problem) -> list[Solution]:
    solutions = []
    for weight, pattern, seed in zip(problem.weights, problem.patterns, problem.seeds, strict=True):
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
        mask = keep_best(scores, pattern)
        solutions.append(Solution(weight * mask, mask))
    return solutions
