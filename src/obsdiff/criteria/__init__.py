"""The pruning methods, one small file each, all with one signature; ``METHODS`` is the table."""

from __future__ import annotations

from obsdiff.criteria import (
    admm,
    diff_pruning,
    dsnot,
    l1,
    magnitude,
    obs,
    obs_diff,
    random,
    sparsegpt,
    taylor,
    wanda,
)
from obsdiff.criteria.base import GroupProblem, Method, Problem, Solution
from obsdiff.errors import UserError
from obsdiff.obs.sweep import BLOCK

METHODS: dict[str, Method] = {
    "obs": Method(
        obs.solve,
        refit=True,
        refit_steps=obs.REFIT_STEPS,
        structured="obs",
        centred=True,
        allocation="measured",
        compared=obs.COMPARED,
    ),
    "obs-diff": Method(
        obs_diff.solve,
        structured="obs-diff",
        compensates=True,
        packages=4,
        multiple_of=1,
        cuts=("heads", "ffn"),  # the counts of tables 3, 4 and 9 leave ResNet blocks whole
        compared=BLOCK,
    ),
    "admm": Method(admm.solve, refit=True, centred=True, allocation="measured"),
    "sparsegpt": Method(sparsegpt.solve, weighting="uniform", compared=BLOCK),
    "wanda": Method(wanda.solve, needs=frozenset({"diagonal"})),
    "dsnot": Method(dsnot.solve, needs=frozenset({"diagonal"})),
    "taylor": Method(taylor.solve, needs=frozenset({"loss_gradient"}), structured="taylor"),
    "diff-pruning": Method(diff_pruning.solve, needs=frozenset({"large_loss_gradient"}), structured="diff-pruning"),
    "ecodiff": Method(None, needs=frozenset({"gates"}), structured="ecodiff"),
    "magnitude": Method(magnitude.solve, needs=frozenset(), structured="magnitude"),
    "l1": Method(l1.solve, needs=frozenset(), structured="l1"),
    "random": Method(random.solve, needs=frozenset(), structured="random"),
}


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: There is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "GroupProblem", "Method", "Problem", "Solution", "find_method"]
