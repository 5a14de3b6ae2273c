"""``obsdiff train``: Lightning's own command line over obsdiff's modules."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from obsdiff.cli.parse import OneLine, Session, clear_errors, instantiating
from obsdiff.cli.train_arguments import check_arguments, last_checkpoint, usage
from obsdiff.errors import UserError
from obsdiff.yamlfiles import use_core_schema

PROGRAM = "obsdiff train"
PLANNING = (  # options of a fit: name, type, default, help
    ("dry_run", bool, False, "Say what the run would take of memory and time, from the configs alone, and end."),
    ("device_memory", str | int | None, None, "What a cuda device may hold, such as 24GB; refuse what does not fit."),
    ("host_memory", str | int | None, None, "The same for the host's memory, and for runs on the cpu."),
)


def main(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; see ``train.py fit --help``."""
    with clear_errors(PROGRAM) as session:
        given = sys.argv[1:] if args is None else args
        check_arguments(given)  # cheap mistakes before costly imports
        command_line(session, given[0] if given else None)(
            save_config_kwargs={"overwrite": True}, trainer_defaults={"num_sanity_val_steps": 0}, args=args
        )


def command_line(session: Session | None = None, command: str | None = None) -> Any:
    """Lightning's command line; a recovery gets what it needs (masks, budget, checkpoints, export) added.

    Args:
        session: Is told what an interrupted run keeps.
        command: The subcommand that will be asked for, if it is known: the options of each take 0.1 s to find out.
    """
    started = time.perf_counter()

    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from obsdiff.callbacks.budget import Budget
    from obsdiff.callbacks.ema import EMA
    from obsdiff.cli.train_session import Asked, Run, own_looks
    from obsdiff.training.checks import check_limits
    from obsdiff.training.recovery import Recovery

    use_core_schema()
    run = Run(started)

    class Parser(OneLine, LightningArgumentParser):
        program = PROGRAM

    class CommandLine(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            every: dict[str, set[str]] = LightningCLI.subcommands()
            return {command: every[command]} if command in every else every

        def init_parser(self, **kwargs: Any) -> Any:
            self.parser_class = Parser
            return super().init_parser(allow_abbrev=False, **kwargs)

        def setup_parser(self, *args: Any, **kwargs: Any) -> None:
            super().setup_parser(*args, **kwargs)
            self.parser.usage = usage()
            for name, parser in getattr(self, "_subcommand_parsers", {}).items():
                parser.usage = usage(name)

        def _set_seed(self) -> None:
            with instantiating():
                super()._set_seed()

        def instantiate_classes(self) -> None:
            with instantiating():
                super().instantiate_classes()

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_class_arguments(Budget, "budget")
            parser.add_subclass_arguments(EMA, "ema", required=False)
            for name, kind, default, told in PLANNING:
                parser.add_argument(f"--{name}", type=kind, default=default, help=told)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            if subcommand := self.config.get("subcommand"):
                run.check(self.config[subcommand], subcommand)

        def fit(self, **kwargs: Any) -> None:
            self.finished = run.says_plan(self.trainer, self.model, self.datamodule, self._asked())
            self.finished = self.finished or run.says_finished(self.trainer, self.model)
            if not self.finished:
                self.trainer.fit(**kwargs)

        def _asked(self) -> Asked:
            return Asked(**{name: self._get(self.config_init, name) for name, *_ in PLANNING})

        def before_validate(self) -> None:
            self._say_it_ourselves()

        def before_test(self) -> None:
            self._say_it_ourselves()

        def _say_it_ourselves(self) -> None:
            if isinstance(self.model, Recovery):
                self.config_init[self.subcommand]["verbose"] = False  # in place of Lightning's table of metrics
                self.before_predict()

        def before_predict(self) -> None:
            if isinstance(self.model, Recovery) and not self.model.evaluation.num_images:
                raise UserError("model.evaluation.num_images is 0, so there is nothing to draw; it must be positive")

        def after_fit(self) -> None:
            if not self.finished:
                run.end(self.trainer, self.model, "fit")

        def after_validate(self) -> None:
            run.end(self.trainer, self.model, "validate")

        def after_test(self) -> None:
            run.end(self.trainer, self.model, "test")

        def after_predict(self) -> None:
            run.end(self.trainer, self.model, "predict")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            given = Given.of(self._get(self.config_init, "trainer", default={}))
            trainer = super().instantiate_trainer(**kwargs)
            own_looks(trainer, given.callbacks)
            if self.subcommand == "fit":
                check_limits(trainer)
            if isinstance(self.model, Recovery):
                if session is not None:
                    session.kept = partial(last_checkpoint, self.model.output)
                asked = self._get(self.config_init, "budget"), self._get(self.config_init, "ema")
                found = [part for part in asked if part is not None]
                complete(trainer, self.model, self.subcommand or "fit", found, given)
            return trainer

    return CommandLine


@dataclass(frozen=True)
class Given:
    """What the user says of a trainer's callbacks and logs, before the trainer adds its own.

    Attributes:
        callbacks: Those the user brings.
        checkpoints: Whether checkpoints may be written.
        logger: Whether a logger is chosen or switched off.
        folder: Whether a folder is named for what has no other.
    """

    callbacks: tuple[Any, ...] = ()
    checkpoints: bool = True
    logger: bool = False
    folder: bool = False

    @classmethod
    def of(cls, trainer: Any) -> Given:
        """From the trainer's instantiated options."""
        callbacks = trainer.get("callbacks") or ()
        return cls(
            tuple(callbacks) if isinstance(callbacks, list | tuple) else (callbacks,),
            trainer.get("enable_checkpointing") is not False,
            trainer.get("logger") not in (None, True),
            trainer.get("default_root_dir") is not None,
        )


def complete(trainer: Any, module: Any, subcommand: str, asked: list[Any], given: Given = Given()) -> None:
    """Add the callbacks of a recovery where the user gave none of their kind, in the order they depend on.

    Masks come first, so that all others see masked weights only; the result is written after everything else has had
    its say, and checkpoints come last, as Lightning has it. Logs go to the run's folder. What the user brings or
    switches off stays so, and a ``fast_dev_run`` writes nothing.

    Args:
        trainer: Changed in place.
        module: The recovery.
        subcommand: fit, validate, test or predict.
        asked: Callbacks with options of their own, such as the budget.
        given: What the user says of callbacks and logs.
    """
    from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from obsdiff.callbacks.checkpoint import LastCheckpoint
    from obsdiff.callbacks.export import Export
    from obsdiff.callbacks.mask import MaskEnforcement
    from obsdiff.callbacks.samples import SampleGrid, SampleWriter

    # each with the kind that stands in its place
    standard: list[tuple[Any, type]] = [(MaskEnforcement(), MaskEnforcement), *((part, type(part)) for part in asked)]
    writing: list[tuple[Any, type]] = [(SampleGrid(), SampleGrid), (Export(), Export)]
    if subcommand == "predict":
        writing.append((SampleWriter(module.output / "predictions"), BasePredictionWriter))
    if given.checkpoints:
        writing.append((LastCheckpoint(module.output / "checkpoints"), ModelCheckpoint))
    # Lightning's own default checkpoint knows no folder; ours replaces it
    lightnings = [] if any(isinstance(c, Checkpoint) for c in given.callbacks) else [ModelCheckpoint]
    own = [callback for callback in trainer.callbacks if type(callback) not in lightnings]
    wanted = standard if trainer.fast_dev_run else standard + writing
    parts = [part for part, kind in wanted if not any(isinstance(callback, kind) for callback in own)] + own

    def place(part: Any) -> int:
        late = 3 if isinstance(part, Checkpoint) else 2 if isinstance(part, Export) else 1
        return 0 if isinstance(part, MaskEnforcement) else late

    parts.sort(key=place)
    trainer.callbacks = parts
    if trainer.fast_dev_run:
        return
    if not given.logger:
        trainer.logger = TensorBoardLogger(str(module.output), name="logs", version="")
    if not given.folder:
        trainer._default_root_dir = str(module.output)  # where the configuration is kept if nothing is logged
