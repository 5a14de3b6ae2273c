"""What a comparison is asked for. The fields are the schema of command line and YAML alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, ScanOptions


@dataclass(kw_only=True)
class CompareOptions:
    """Compare methods, patterns, allocations and recoveries on the same prompts and seeds, at equal budgets.

    Every combination is a cell; finished cells are kept in the output folder by content, so that the same command goes
    on where it was stopped and a larger comparison runs only what is new.

    Args:
        pipeline: The dense pipeline: an embedded one (digits-sd3), a folder, or a hub id (owner/name).
        output: Folder of the comparison.
        methods: Methods of pruning, as for prune; METHOD+refit, such as diff-pruning+refit, brings what stays to least
            squares, as --refit true does, and METHOD+scratch, such as random+scratch, replaces what stays by untrained
            weights: what recipes make of the same small model without what it knew.
        patterns: Patterns, as for prune; "PATTERN BUDGET", such as "structured parameters:0.5", for a budget.
        allocations: How sparsity is shared out among layers: uniform, measured or owl. Where one does not go with a
            pattern or method, the cell is left out and the report says why.
        variants: By name, other options of prune, such as {usual: {}, late: {calibration: {weighting: log_increase}}}:
            every combination is run with each, and compared with itself under the first, in place of the reference.
        recipes: By name, YAML files of recoveries (configs/recover); what they say of pipeline, pruning, folders, seeds
            and evaluation is replaced. Each starts from the same pruned pipeline.
        budget: Limits of every recovery, over those of its recipe, such as {steps: 500}: steps, images, denoiser_flops,
            device_s or wall_s; calibration, scan, solving and recording count.
        seeds: Of calibration, noise and training; each has its own evaluation images.
        reference: The method that the others are compared with.
        calibration: How layer inputs are measured, once for all methods that ask for the same weighting.
        scan: How sensitivity is measured for measured allocations, once for each method, seed and kind of pattern.
        evaluation: Images of each cell. The noise seeds of the second of ``seeds`` follow those of the first.
        jobs: Processes that work side by side on this machine.
        devices: Where they work, in turns, such as [cuda:0, cuda:1]; default: cuda if there is one, else cpu.
        part: Do only one part, "K/N" with K from 0, and write no report: for a cluster, where N tasks share the
            output folder.
        shown: Images of each cell in the report.
    """

    pipeline: str
    output: str
    methods: list[str]
    patterns: list[str]
    allocations: list[str] = field(default_factory=lambda: ["uniform"])
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipes: Mapping[str, str] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    reference: str = "obs"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    scan: ScanOptions = field(default_factory=ScanOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    jobs: int = 1
    devices: list[str] = field(default_factory=list)
    part: str | None = None
    shown: int = 8

    @property
    def compared_with(self) -> tuple[str, str]:
        """What a row is compared with: the row that is the same but for this, a key of rows and its value."""
        return ("variant", next(iter(self.variants))) if self.variants else ("method", self.reference)
