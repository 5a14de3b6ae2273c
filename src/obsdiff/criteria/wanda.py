"""Wanda (2306.11695): ``|W_ij| · ‖x_j‖``, compared within each output row; weights are not changed."""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.select import keep_best_per_row


def solve(problem: Problem) -> list[Solution]:
    norms = problem.powers.sqrt()
    masks = [
        keep_best_per_row(weight.abs() * norms, pattern)
        for weight, pattern in zip(problem.weights, problem.patterns, strict=True)
    ]
    return [Solution(weight * mask, mask) for weight, mask in zip(problem.weights, masks, strict=True)]
