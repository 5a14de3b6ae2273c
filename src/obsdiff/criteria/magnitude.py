"""Magnitude: ``|W_ij|``, compared within each layer."""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.select import keep_best


def solve(problem: Problem) -> list[Solution]:
    masks = [
        keep_best(weight.abs(), pattern) for weight, pattern in zip(problem.weights, problem.patterns, strict=True)
    ]
    return [Solution(weight * mask, mask) for weight, mask in zip(problem.weights, masks, strict=True)]
