"""SparseGPT (2301.00774): the published sweep, by default on uniformly weighted statistics and without a refit."""

from obsdiff.criteria import obs
from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.sweep import BLOCK


def solve(problem: Problem) -> list[Solution]:
    return obs.solve(problem, compared=BLOCK, even=True)
