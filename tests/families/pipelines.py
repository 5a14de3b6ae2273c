"""The table of tiny random pipelines, one row a family, each of its true pipeline and denoiser classes.

``PIPELINES["flux"].build()`` gives the pipeline, and
``pipe(**row.conditioning(n), **row.call, output_type=row.output_type)`` runs it on n precomputed rows.
See ``TinyPipeline``.
"""

from __future__ import annotations

from tests.families.dits import DITS
from tests.families.joint import JOINT
from tests.families.making import PROMPTS, TinyPipeline
from tests.families.unets import UNETS
from tests.families.videos import VIDEOS

__all__ = ["PIPELINES", "PROMPTS", "TinyPipeline"]

PIPELINES: dict[str, TinyPipeline] = {**JOINT, **UNETS, **DITS, **VIDEOS}
