"""What pruning options may say, checked value by value without torch: wrong ones are answered at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from obsdiff.errors import UserError
from obsdiff.names import (
    AGAINST_REAL,
    ALLOCATIONS,
    BY_NETWORK,
    DEAD,
    EXTRACTORS,
    FUSIONS,
    MEASURES,
    METHODS,
    PRECISIONS,
    STRUCTURED_METHODS,
    UNIT_METHODS,
)
from obsdiff.numbers import check_number, check_seed, check_whole
from obsdiff.obs.pattern import Depth, Hybrid, is_bare, of_layers, of_units, parse_request
from obsdiff.obs.timesteps import check_weighting
from obsdiff.pruning.options import (
    BACKWARD,
    FORWARD,
    CalibrationOptions,
    EvaluationOptions,
    Limits,
    PruneOptions,
    PruningOptions,
    ReconstructionOptions,
    ScanOptions,
    check_compared,
)
from obsdiff.yamlfiles import read_yaml

KINDS = ("sparsity", "parameters", "bytes", "flops", "latency")
_SYNTAX = "use sparsity:0.5 (share removed), parameters:0.7, bytes:0.7, flops:0.7 or latency:0.7 (share that stays)"


@dataclass(frozen=True)
class Budget:
    """What may stay.

    Attributes:
        kind: "sparsity", "parameters", "bytes" (of the denoiser's tensors as stored), "flops" or "latency".
        share: Of the dense denoiser, in (0, 1]: for "sparsity" the share of the planned layers' weights (structured:
            of the denoiser's parameters) that goes, for the others the share that stays.
    """

    kind: str
    share: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of budget {self.kind!r}; {_SYNTAX}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.share:.10g}"


def parse_budget(text: str) -> Budget:
    """The budget that ``text`` names, such as "parameters:0.7".

    Raises:
        UserError: It names none, or a share out of range.
    """
    match = re.fullmatch(r"(\w+):([0-9.eE+-]+)", str(text).strip())
    if match is None or match[1] not in KINDS:
        raise UserError(f"unknown budget {text!r}; {_SYNTAX}")
    try:
        share = float(match[2])
    except ValueError:
        raise UserError(f"cannot read {match[2]!r} as a number in budget {text!r}; {_SYNTAX}") from None
    if not (0 <= share < 1 if match[1] == "sparsity" else 0 < share <= 1):
        raise UserError(f"budget {text!r} is out of range; {_SYNTAX}")
    return Budget(match[1], share)


def check_method(method: str) -> None:
    """Refuse a name that no method has.

    Raises:
        UserError: It lists what there is.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")


def check_values(options: PruningOptions) -> None:
    """Refuse values that are wrong whatever the pipeline and the other options are.

    Raises:
        UserError: Naming the first one.
    """
    check_method(options.method)
    if options.plan is not None:
        read_yaml(options.plan, "plan")
    else:
        request = parse_request(options.pattern)
        units = of_units(request)
        if isinstance(request, Depth):
            _check_depth(request, options)
        if is_bare(options.pattern) and options.budget is None:
            raise UserError(f"pattern {options.pattern!r} has no number; give one, or --budget, by which it is chosen")
        ranks = {} if units is None else units.directions
        if ranks and options.allocation == "owl":
            raise UserError("owl does not say how ranks share a budget; use --allocation measured")
        if ranks and (options.budget or "").startswith("latency:"):
            named = " and ".join(ranks)
            raise UserError(f"ranks hardly change latency; use a budget in parameters or flops, or leave {named} out")
        if units is not None and units.cuts and options.method not in STRUCTURED_METHODS:
            *some, last = STRUCTURED_METHODS
            other = f"{', '.join(some)} or {last}"
            raise UserError(f"method {options.method} cannot prune heads and neurons; use {other} with {units}")
        single = of_layers(request) is not None and of_layers(request) != units
        if single and options.method in UNIT_METHODS:
            raise UserError(
                f"method {options.method} removes whole heads, neurons and channels, no single weights; use it with "
                f"structured:RATIO, or another method with {options.pattern}"
            )
        if isinstance(of_layers(request), Hybrid) and (options.budget or "").startswith("sparsity:"):
            raise UserError(
                f"a budget in sparsity does not say how {options.pattern} shares it between units and single weights; "
                "use parameters:SHARE, which counts what is stored dense"
            )
    if options.fusion not in FUSIONS:
        raise UserError(f"unknown fusion {options.fusion!r}; choose one of {', '.join(FUSIONS)}")
    if options.refit_steps is not None:
        check_whole("refit_steps", options.refit_steps)
    if options.compared_columns is not None:
        check_compared(options.method, options.compared_columns)
    if options.dead not in DEAD:
        raise UserError(f"unknown choice dead {options.dead!r}; choose one of {', '.join(DEAD)}")
    if options.allocation is not None and options.allocation not in ALLOCATIONS:
        raise UserError(f"unknown allocation {options.allocation!r}; choose one of {', '.join(ALLOCATIONS)}")
    if options.budget is not None:
        kind = parse_budget(options.budget).kind
        unfit = options.plan is None and units is None and not isinstance(request, Depth)
        if unfit and kind in ("bytes", "flops", "latency"):
            why = "zeros are stored like other weights" if kind == "bytes" else "dense kernels do not skip zeros"
            raise UserError(f"a budget in {kind} needs a structured pattern: {why}")
    check_seed("seed", options.seed)
    _check_calibration(options.calibration)
    check_scan(options.scan)
    _check_reconstruction(options.reconstruction)
    _check_limits(options.limits)


def _check_depth(depth: Depth, options: PruningOptions) -> None:
    """Refuse what a number of stages leaves without effect."""
    if options.budget is not None:
        _check_depth_under(depth, parse_budget(options.budget))
    if depth.then is not None:
        return
    default, calibration = PruningOptions(), CalibrationOptions()
    named = ("method", "limits", "refit", "include", "exclude", "fusion", "compared_columns", "refit_steps")
    told = [name for name in named if getattr(options, name) != getattr(default, name)]
    told += ["allocation"] if options.allocation not in (None, "uniform") else []
    given = options.calibration
    inputs = ("tokens", "padding", "precision", "damping")
    told += [f"calibration.{k}" for k in inputs if getattr(given, k) != getattr(calibration, k)]
    told += ["calibration.packages"] if (given.packages or 1) > 1 else []
    told += ["calibration.streamed"] if given.streamed else []
    told += ["scan.levels"] if options.scan.levels is not None else []
    told += ["scan.by"] if options.scan.by != default.scan.by else []
    told += ["dead remove"] if options.dead == "remove" else []
    if told:
        raise UserError(f"{depth} alone prunes no layers, so --{told[0]} has no effect; leave it out, or add a pattern")


def _check_depth_under(depth: Depth, budget: Budget) -> None:
    """Refuse budgets that say nothing of stages."""
    if budget.kind in ("sparsity", "latency"):
        raise UserError(
            f"a budget in {budget.kind} does not choose stages; use parameters:SHARE, bytes:SHARE or flops:SHARE"
        )
    if depth.then is None and depth.amount is not None:
        raise UserError(f"{depth} says how many stages go; leave out --budget, or use depth or {depth}+structured")
    if depth.then is not None and of_units(depth) is None:
        raise UserError(
            f"a budget chooses stages together with heads, neurons and ranks, not with {depth.then} alone; use "
            f"depth+structured+{depth.then}"
        )


def check_scan(scan: ScanOptions) -> None:
    """Refuse impossible scan options.

    Raises:
        UserError: Naming the first one.
    """
    if scan.triples is not None:
        check_whole("scan.triples", scan.triples)
    for level in scan.levels or ():
        if not 0 < level < 1:
            raise UserError(f"scan.levels holds {level:g}; levels are shares removed, above 0 and below 1")
    if scan.levels is not None and not scan.levels:
        raise UserError("scan.levels is empty; give at least one share, or leave it out")
    if scan.by not in (FORWARD, BACKWARD):
        raise UserError(f"--scan.by is {scan.by!r}; it is {FORWARD} or {BACKWARD}")
    if scan.by == BACKWARD and scan.levels is not None:
        raise UserError("a backward scan has no levels; leave out --scan.levels, or use --scan.by forward")


def check_evaluation(evaluation: EvaluationOptions) -> None:
    """Refuse impossible evaluation options.

    Raises:
        UserError: Naming the first one.
    """
    check_whole("evaluation.num_images", evaluation.num_images, 0)
    check_whole("evaluation.batch_size", evaluation.batch_size)
    check_seed("evaluation.seed", evaluation.seed)
    check_seed("evaluation.seed + num_images", evaluation.seed + evaluation.num_images)
    for name in evaluation.measures:
        kind, at, extractor = name.partition("@")
        if at and kind in MEASURES and kind not in BY_NETWORK:
            raise UserError(f"evaluation.measures names {name!r}; {kind} is measured without a named network")
        if kind not in MEASURES or (at and extractor not in EXTRACTORS):
            raise UserError(
                f"evaluation.measures names {name!r}; choose one of {', '.join(MEASURES)}, with @ and one of "
                f"{', '.join(EXTRACTORS)} where a named network measures"
            )
    if twice := [name for name in evaluation.measures if evaluation.measures.count(name) > 1]:
        raise UserError(f"evaluation.measures names {twice[0]} twice")
    if unknown := [name for name in evaluation.extractors if name not in EXTRACTORS]:
        raise UserError(f"evaluation.extractors names {unknown[0]!r}; choose one of {', '.join(EXTRACTORS)}")
    kinds = [name.partition("@")[:2] for name in evaluation.measures]
    if evaluation.real is not None and not any(kind in AGAINST_REAL and (at or kind == "cmmd") for kind, at in kinds):
        raise UserError(
            "evaluation.real is named, but nothing is compared with it; name a measure that is, such as "
            "--evaluation.measures '[mse, frechet@inception]'"
        )


def check_precision_name(name: str, precision: str | None) -> None:
    """Refuse an unknown one.

    Raises:
        UserError: It is.
    """
    if precision not in (None, *PRECISIONS):
        raise UserError(f"unknown choice {name} {precision!r}; choose one of {', '.join(PRECISIONS)}")


def _check_calibration(calibration: CalibrationOptions) -> None:
    for name in ("num_prompts", "steps", "batch_size", "packages", "tokens"):
        if (value := getattr(calibration, name)) is not None:
            check_whole(f"calibration.{name}", value)
    if calibration.guidance_scale is not None:
        check_number("calibration.guidance_scale", calibration.guidance_scale, 0.0)
    if calibration.weighting is not None:
        check_weighting(calibration.weighting)
    check_precision_name("calibration.precision", calibration.precision)
    check_number("calibration.damping", calibration.damping, 0.0)


def check_offload(options: PruneOptions) -> None:
    """Refuse to offload, or to let rest on a disk, what needs the denoiser whole.

    Raises:
        UserError: Naming the option.
    """
    if options.offload and not options.calibration.streamed:
        raise UserError("--offload has one block at a time on the device; add --calibration.streamed true")
    if options.offload and options.reconstruction.asked:
        raise UserError(
            "a reconstruction (--reconstruction.steps, --reconstruction.closed_form) has the dense denoiser beside the "
            "pruned one; leave it out, or --offload"
        )
    if options.weights_on_disk and options.reconstruction.asked:
        raise UserError(
            "a reconstruction (--reconstruction.steps, --reconstruction.closed_form) has the dense denoiser in memory; "
            "leave it out, or --weights_on_disk"
        )


def _check_reconstruction(reconstruction: ReconstructionOptions) -> None:
    check_whole("reconstruction.steps", reconstruction.steps, 0)
    check_number("reconstruction.lr", reconstruction.lr, 0.0)
    check_whole("reconstruction.batch_size", reconstruction.batch_size)
    check_whole("reconstruction.triples", reconstruction.triples, 2)
    if not reconstruction.asked and reconstruction != ReconstructionOptions():
        raise UserError(
            "options of the reconstruction need --reconstruction.steps, which is 0, or --reconstruction.closed_form"
        )
    if not reconstruction.steps and reconstruction.lr != ReconstructionOptions.lr:
        raise UserError("reconstruction.lr is for --reconstruction.steps, which is 0; leave it out")


def _check_limits(limits: Limits) -> None:
    for name, shares in (("floors", limits.floors), ("ceilings", limits.ceilings)):
        for pattern, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"limits.{name} holds {share:g} for {pattern!r}; it must be a share from 0 to 1")
