"""SparseGPT (2301.00774): the published sweep, by default on uniformly weighted statistics and without a refit."""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.sweep import BLOCK, sweep


def solve(problem: Problem) -> list[Solution]:
    factor, _ = upper_factor(problem.measured, problem.damping)
    return [Solution(w, mask) for w, mask in sweep(problem.weights, factor, problem.patterns, BLOCK, even=True)]
