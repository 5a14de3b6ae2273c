"""SparseGPT (2301.00774): the published sweep, by default on uniformly weighted statistics and without a refit."""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.sweep import sweep


def solve(problem: Problem) -> list[Solution]:
    factor, _ = upper_factor(problem.measured, problem.damping)
    swept = sweep(problem.weights, factor, problem.patterns, problem.compared, even=True)
    return [Solution(w, mask) for w, mask in swept]
