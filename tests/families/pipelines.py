"""The table of tiny random pipelines, one row a family, each of its true pipeline and denoiser classes.

``PIPELINES["flux"].build()`` gives the pipeline, and
``pipe(**row.conditioning(n), **row.call, output_type=row.output_type)`` runs it on n precomputed rows.
See ``TinyPipeline``.
"""

from __future__ import annotations

import pytest

from tests.families.dits import DITS
from tests.families.joint import JOINT
from tests.families.making import PROMPTS, TinyPipeline
from tests.families.unets import UNETS
from tests.families.videos import VIDEOS

__all__ = ["PIPELINES", "PROMPTS", "TinyPipeline", "each"]

PIPELINES: dict[str, TinyPipeline] = {**JOINT, **UNETS, **DITS, **VIDEOS}

# of each kind of wiring one or two: what takes seconds a family runs on the others among the slow cases
USUAL = {"sd35", "flux", "qwen-image", "sd15", "ddpm", "pixart-alpha", "z-image", "wan22"}


def each(names, usual=USUAL):
    """Families as parameters of a test; those that are not among the usual are slow cases."""
    return [pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in names]
