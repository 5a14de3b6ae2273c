"""OBS-Diff (2510.06751): the OBS sweep on timestep-weighted statistics; the refit follows by default.

Scores are compared over 32 columns instead of the published 128 (later choices then know of earlier compensation), and
how many go from each 32 follows the whole layer's ``w² H_ii`` instead of being equal; docs/method.md has the figures.
"""

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.sweep import sweep

COMPARED = 32
REFIT_STEPS = 2  # at least; docs/method.md has the error by steps


def solve(problem: Problem, compared: int = COMPARED, even: bool = False) -> list[Solution]:
    factor, _ = upper_factor(problem.measured, problem.damping)
    return [Solution(w, mask) for w, mask in sweep(problem.weights, factor, problem.patterns, compared, even)]
