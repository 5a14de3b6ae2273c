"""An evaluation in the one form that all reports give it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from obsdiff.evaluation.measures.base import Figures
from obsdiff.evaluation.suite import Suite

DENSE, RESULTS = "dense", ("recovered", "pruned", "evaluated")  # the later first
UNGUIDED = "_unguided"
WORST = 5  # prompts that are named
STAGES = (DENSE, *reversed(RESULTS))


@dataclass(frozen=True)
class Images:
    """Images (n, c, h, w) in [0, 1] of the evaluation's prompts and seeds.

    Attributes:
        guided: At the pipeline's own guidance.
        unguided: Without, where the Fréchet distance shows a loss of quality that guidance hides; can be empty.
    """

    guided: Tensor
    unguided: Tensor


def figures_of(suite: Suite, images: Images, prompts: Sequence[str], dense: Images | None = None) -> Figures:
    """What images come to; without guidance only what needs no dense images, under names that say so."""
    unguided = suite.measure(images.unguided, prompts) if len(images.unguided) else {}
    found = suite.measure(images.guided, prompts, None if dense is None else dense.guided)
    return found | {f"{name}{UNGUIDED}": value for name, value in unguided.items()}


def evaluation_of(
    suite: Suite, prompts: Sequence[str], seeds: Sequence[int], drawn: Mapping[str, Images]
) -> dict[str, Any]:
    """An evaluation as reports hold it.

    Args:
        suite: The measures.
        prompts, seeds: One per image.
        drawn: Images by what drew them, of ``dense``, ``pruned``, ``recovered`` or ``evaluated``.

    Returns:
        ``n``, ``first_seed``; ``says``: what reads the images, by measure; ``skipped``: why a measure is not there;
        the figures of each of ``drawn`` under its name; ``few``: the least number of images from which a covariance has
        full rank, by measure, where there are fewer; ``worst``: the prompts whose images moved furthest from the dense
        ones, with their ``mse`` and ``n``; ``remarks``: what should not be overlooked.
    """
    dense = drawn.get(DENSE)
    figures = {
        name: figures_of(suite, images, prompts, None if name == DENSE else dense) for name, images in drawn.items()
    }
    few = {name: width + 1 for name, width in suite.widths().items() if len(prompts) <= width}
    return {
        "n": len(prompts),
        "first_seed": seeds[0],
        "says": suite.says,
        "skipped": suite.skipped,
        **figures,
        "few": few,
        "worst": worst_prompts(suite.values().get("mse"), prompts),
        "remarks": remarks_on(figures, few),
    }


def worst_prompts(errors: Tensor | None, prompts: Sequence[str], count: int = WORST) -> list[dict[str, Any]]:
    """The ``count`` prompts with the largest mean of errors (n,); none where there are no errors or no prompts, or an
    error is not finite."""
    if errors is None or not any(prompts) or not bool(errors.isfinite().all()):
        return []
    held: dict[str, list[float]] = {}
    for prompt, error in zip(prompts, errors.tolist(), strict=True):
        held.setdefault(prompt, []).append(error)
    means = {prompt: sum(values) / len(values) for prompt, values in held.items()}
    worst = sorted(means, key=lambda prompt: -means[prompt])[:count]
    return [{"prompt": prompt, "mse": means[prompt], "n": len(held[prompt])} for prompt in worst]


def result_of(evaluation: Mapping[str, Any]) -> Figures:
    """The figures of what came out."""
    return next(evaluation[name] for name in RESULTS if name in evaluation)


def remarks_on(figures: Mapping[str, Figures], few: Collection[str] = ()) -> list[str]:
    """What a reader of these figures should not overlook; measures of too ``few`` images say nothing either way."""
    found = []
    order = [name for name in STAGES if name in figures]
    for before, after in pairwise(order):
        old, new = figures[before], figures[after]
        worse = [what for what, is_so in _worse(old, new).items() if is_so]
        for name in old:
            told = name.startswith("frechet") and name.removesuffix(UNGUIDED) not in few
            if told and worse and _less(new.get(name), old[name]):
                change = f"{old[name]:.4g} to {new[name]:.4g}"
                found.append(
                    f"{name} falls from {before} to {after} ({change}) while {' and '.join(worse)}: it does not show "
                    "what was lost"
                )
    return found


def _worse(old: Figures, new: Figures) -> dict[str, bool]:
    alignment = _less(new.get("alignment"), old.get("alignment"))
    error = new.get("mse")
    return {
        "images move away from the dense ones": error is not None and (old.get("mse") or 0.0) < error,
        "alignment falls": alignment,
    }


def _less(value: float | None, other: float | None) -> bool:
    return value is not None and other is not None and value < other
