"""What ``obsdiff train`` looks at and says before a run starts, and what it says when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, ProgressBar

from obsdiff.allocation.fitting import room_of
from obsdiff.allocation.planning import pattern_of
from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.ema import EMA
from obsdiff.callbacks.export import Export
from obsdiff.callbacks.find import find
from obsdiff.callbacks.progress import BudgetProgress, RateAndBudget, ShortSummary
from obsdiff.callbacks.samples import SampleWriter
from obsdiff.costs import Cost, exhausted
from obsdiff.errors import UserError
from obsdiff.export.recovered import RESULT
from obsdiff.export.summary import aligned, evaluation_summary, images_summary, limits_text, recovery_summary
from obsdiff.files import read_json
from obsdiff.obs.pattern import of_layers
from obsdiff.paths import user_path
from obsdiff.progress import duration
from obsdiff.pruning.folder import run_folder
from obsdiff.pruning.manifest import FILE, read_manifest
from obsdiff.training.identity import differences, module_settings
from obsdiff.training.recovery import Recovery
from obsdiff.training.resume import check_resume, read_checkpoint
from obsdiff.training.stage import PRUNED, request_in, request_of

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Asked:
    """What is asked of a plan: whether it is all, and the sizes that a run must not exceed."""

    dry_run: bool = False
    device_memory: str | int | None = None
    host_memory: str | int | None = None


class Run:
    """One call of the command line.

    Args:
        started: When it began, by ``time.perf_counter``.

    Attributes:
        checkpoint: The file that the run goes on from, or None.
        trusted: It may hold anything (``--weights_only false``); it is not read here then.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.checkpoint: Path | None = None
        self.trusted = False

    def check(self, config: Any, subcommand: str) -> None:
        """Refuse a checkpoint that cannot be resumed from, and Lightning's own way to an optimizer, before anything is
        loaded.

        Args:
            config: The parsed options of the subcommand.
            subcommand: fit, validate, test or predict.
        """
        output = _output(config.get("model"))
        for option in ("optimizer", "lr_scheduler"):
            if output is not None and config.get(option):
                raise UserError(
                    f"--{option} is for modules that have weights from the start; of a recovery give the class as "
                    "--model.optimization.optimizer, its other arguments as --model.optimization.arguments and the "
                    "schedule as --model.optimization.schedule"
                )
        if subcommand != "fit" and any(config.get(name) for name in vars(Asked())):
            raise UserError(f"--dry_run, --device_memory and --host_memory plan a fit; leave them out of {subcommand}")
        asked = config.get("ckpt_path")
        if asked is None:
            return
        if "://" not in str(asked):
            asked = config["ckpt_path"] = str(user_path(asked, "--ckpt_path"))
        given = config.get("trainer.callbacks") or []
        folders = [folder for part in given if (folder := _folder_of(part)) is not None]
        if output is not None and output / CHECKPOINTS not in folders:
            folders.append(output / CHECKPOINTS)
        root = Path(config.get("trainer.default_root_dir") or ".")
        self.trusted = config.get("weights_only") is False
        self.checkpoint = check_resume(str(asked), folders, output, root, subcommand == "fit", self.trusted)
        if self.checkpoint is not None:
            config["ckpt_path"] = str(self.checkpoint)

    def says_plan(self, trainer: Any, module: Any, data: Any, asked: Asked) -> bool:
        """Plan a fit where that is asked for; whether there is nothing else to do.

        Raises:
            UserError: It does not fit, or is no recovery.
        """
        if asked == Asked():
            return False
        from obsdiff.training.planning import Settings, check_room, plan_recovery, plan_text

        if not isinstance(module, Recovery) or not isinstance(getattr(data, "batch_size", None), int):
            raise UserError(
                "--dry_run, --device_memory and --host_memory plan a recovery whose data module has a batch_size"
            )
        device = str(trainer.strategy.root_device)
        room = room_of(asked, device)
        budget = find(trainer, Budget)
        limits = {} if budget is None else budget.limits
        counted = [limits.get("steps"), trainer.max_steps if trainer.max_steps >= 0 else None]
        steps = min((limit for limit in counted if limit is not None), default=None)
        settings = Settings(
            module,
            data,
            device,
            trainer.precision,
            find(trainer, EMA) is not None,
            None if steps is None else int(steps),
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )
        planned = plan_recovery(settings)
        check_room(planned, room)
        if asked.dry_run and trainer.is_global_zero:
            print(plan_text(planned, settings))
        return asked.dry_run

    def says_finished(self, trainer: Any, module: Any) -> bool:
        """Say what a fit is about to do; or, if nothing is left to do, say that, and return True."""
        if not isinstance(module, Recovery):
            return False
        module.resumed = self.checkpoint is not None
        contents = {} if self.checkpoint is None or self.trusted else read_checkpoint(self.checkpoint)
        report = finished_report(trainer, module, contents)
        if trainer.is_global_zero and report is not None:
            print(_finished(trainer, module, report, self.checkpoint))
        elif trainer.is_global_zero:
            print("\n".join(_announcement(trainer, module, contents, self.checkpoint)), file=sys.stderr)
        return report is not None

    def end(self, trainer: Any, module: Any, subcommand: str) -> None:
        """Say what was done and where it lies."""
        if trainer.is_global_zero and (text := self.summary(trainer, module, subcommand)):
            print(text)

    def summary(self, trainer: Any, module: Any, subcommand: str) -> str:
        """The lines that :meth:`end` prints."""
        took = time.perf_counter() - self.started
        if subcommand == "fit":
            return _fitted(trainer, module, took)
        if not isinstance(module, Recovery):
            return ""
        name, refs = f"{self.checkpoint or module.start.folder or module.start.dense}", module.frozen.refs
        if refs is None:
            return ""
        writer = find(trainer, SampleWriter)
        if subcommand == "predict" and writer is not None:
            return images_summary(f"by {name}", [writer.file(number) for number in range(len(refs.prompts))], took)
        if subcommand == "predict" or module.validation is None or not module.validation.figures:
            return ""
        return evaluation_summary(name, module.validation.report(), took)


def own_looks(trainer: Any, given: Sequence[Any]) -> None:
    """Lightning's default bar and table become ours, and loggers get the learning rate and what is used of the budget.

    What the user brought or turned off stays so.

    Args:
        trainer: With Lightning's defaults.
        given: The callbacks that the user named.
    """

    def ours(part: Any) -> Any:
        if any(part is own for own in given):
            return part
        if isinstance(part, ProgressBar):
            return BudgetProgress()
        return ShortSummary() if isinstance(part, ModelSummary) else part

    trainer.callbacks = [ours(part) for part in trainer.callbacks]
    if trainer.loggers and find(trainer, LearningRateMonitor) is None:
        trainer.callbacks.insert(0, RateAndBudget())


def finished_report(trainer: Any, module: Recovery, contents: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of the result in the module's output, if going on from this checkpoint would add nothing to it.

    Whatever is in doubt (another request, a result that is not whole) counts as unfinished: the run itself finds out.
    """
    folder = module.output / RESULT
    try:
        report = read_json(folder / "report.json", "a report")
        identity = contents["obsdiff"]
        start = run_folder(module.pipeline) if module.pruning is None else module.output / PRUNED
        manifest = {} if start is None else read_manifest(start)
        wanted = {} if module.pruning is None else request_of(module.pipeline, module.pruning)
        request = request_in(manifest)
        same = (
            (folder / "pipeline" / "model_index.json").is_file()
            and report["objective"] == module.weights
            and report["recovery"]["steps"] == contents["global_step"]
            and identity["pattern"] == manifest.get("pattern")
            and not differences(identity["settings"], module_settings(module), both=True)
            and all(request.get(key) == value for key, value in wanted.items())
        )
        spent = sum((Cost(**cost) for cost in report["budget"]["used"].values()), Cost())
        step = Cost(**contents["callbacks"]["Budget"]["step"])
    except (UserError, KeyError, TypeError):
        return None
    budget = find(trainer, Budget)
    done = 0 <= trainer.max_steps <= contents["global_step"]
    return report if same and (done or exhausted({} if budget is None else budget.limits, spent, step)) else None


def _finished(trainer: Any, module: Recovery, report: Mapping[str, Any], checkpoint: Path | None) -> str:
    budget = find(trainer, Budget)
    raise_it = "" if budget is None or not budget.limits else f"; raise --budget.{next(iter(budget.limits))} to go on"
    head = f"finished: {checkpoint} is at step {report['recovery']['steps']:,}, the end of the budget{raise_it}"
    return f"{head}\n{recovery_summary(report, module.output / RESULT)}"


def _announcement(
    trainer: Any, module: Recovery, contents: Mapping[str, Any], checkpoint: Path | None
) -> Iterator[str]:
    """What a recovery is about to do: from where, what, within which budget, and where the result will lie."""
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in module.weights.items())
    budget = find(trainer, Budget)
    limits = limits_text(budget.limits) if budget is not None and budget.limits else _trainer_limits(trainer)
    pruned = module.output / PRUNED
    if module.pruning is None:
        start = f"take {module.pipeline} as it is"
    elif (pruned / FILE).exists():
        start = f"take {pruned} as pruned before"
    else:
        chosen = "" if of_layers(pattern_of(module.pruning)) is None else f" by {module.pruning.method}"
        start = f"prune {module.pipeline} to {module.pruning.pattern}{chosen}"
    rate = f"{module.optimization.schedule} learning rate from {module.optimization.lr:g}"
    yield f"recovery: {start}, then train on {terms} ({rate}); budget {limits}"
    images = module.evaluation.num_images
    if images:
        yield f"evaluation: {images} images each by the dense, the pruned and the recovered pipeline"
    last = module.output / CHECKPOINTS / "last.ckpt"
    if checkpoint is not None:
        step = f"step {contents['global_step']:,}: " if contents else ""
        yield f"going on from {step}{checkpoint}"
    elif last.exists():
        yield f"starting anew: {last} of an earlier run will be replaced (--ckpt_path last would go on from it)"
    if find(trainer, Export) is not None:
        yield f"the result will lie in {module.output / RESULT}"


def _trainer_limits(trainer: Any) -> str:
    if trainer.max_steps >= 0:
        return f"{trainer.max_steps:,} steps"
    return f"{trainer.max_epochs} epochs" if (trainer.max_epochs or -1) >= 0 else "none, until it is stopped"


def _fitted(trainer: Any, module: Any, took: float) -> str:
    """The figures of a finished fit; of a run that wrote no result, what there is to say."""
    steps = f"{trainer.global_step:,} steps of {type(module).__name__}"
    rows = [("trained", steps), ("time", duration(took))]
    if not isinstance(module, Recovery):
        output = getattr(module, "output", None)
        return aligned([*rows, ("result", str(output))] if output is not None and Path(output).exists() else rows)
    folder = module.output / RESULT
    if find(trainer, Export) is None or not (folder / "report.json").is_file():
        return aligned([*rows, ("result", "none was written")])
    return recovery_summary(read_json(folder / "report.json", "a report"), folder, took)


def _output(model: Any) -> Path | None:
    """The folder of a recovery, from its options; None for other modules."""
    name, _, kind = str(model.get("class_path")).rpartition(".")
    found = getattr(import_module(name), kind, None) if name else None
    ours = isinstance(found, type) and issubclass(found, Recovery)
    return user_path(model.init_args.output, "model.output") if ours else None


def _folder_of(part: Any) -> Path | None:
    """Where a callback keeps checkpoints, from its options."""
    folder = (part.get("init_args") or {}).get("dirpath")
    return None if folder is None else Path(folder)
