"""ALPS (2406.07831): the support by operator splitting; the refit, on by default, gives the weights."""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.admm import Spectrum, admm_support


def solve(problem: Problem) -> list[Solution]:
    spectrum = Spectrum(problem.measured, problem.damping)
    masks = [
        admm_support(weight, spectrum, pattern)
        for weight, pattern in zip(problem.weights, problem.patterns, strict=True)
    ]
    return [Solution(weight * mask, mask) for weight, mask in zip(problem.weights, masks, strict=True)]
