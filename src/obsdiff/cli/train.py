"""``obsdiff train``: Lightning's own command line over obsdiff's modules."""

from __future__ import annotations

import time
from typing import Any

from obsdiff.cli.parse import clear_errors


def main(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; see ``train.py fit --help``."""
    with clear_errors("obsdiff train"):
        command_line()(save_config_kwargs={"overwrite": True}, trainer_defaults={"num_sanity_val_steps": 0}, args=args)


def command_line() -> Any:
    """Lightning's command line; a recovery gets what it needs (masks, budget, checkpoints, export) added."""
    started = time.perf_counter()

    from lightning.pytorch.cli import LightningCLI

    from obsdiff.callbacks.budget import Budget
    from obsdiff.callbacks.ema import EMA
    from obsdiff.cli.train_session import Run, own_looks
    from obsdiff.training.recovery import Recovery

    run = Run(started)

    class CommandLine(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_class_arguments(Budget, "budget")
            parser.add_subclass_arguments(EMA, "ema", required=False)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            if subcommand := self.config.get("subcommand"):
                run.check(self.config[subcommand], subcommand)

        def fit(self, **kwargs: Any) -> None:
            self.finished = run.says_finished(self.trainer, self.model)
            if not self.finished:
                self.trainer.fit(**kwargs)

        def before_validate(self) -> None:
            self._say_it_ourselves()

        def before_test(self) -> None:
            self._say_it_ourselves()

        def _say_it_ourselves(self) -> None:
            if isinstance(self.model, Recovery):
                self.config_init[self.subcommand]["verbose"] = False  # in place of Lightning's table of metrics

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
            given = list(self._get(self.config_init, "trainer.callbacks") or [])
            trainer = super().instantiate_trainer(**kwargs)
            own_looks(trainer, given)
            if isinstance(self.model, Recovery):
                asked = self._get(self.config_init, "budget"), self._get(self.config_init, "ema")
                complete(trainer, self.model, self.subcommand or "fit", [part for part in asked if part is not None])
            return trainer

    return CommandLine


def complete(trainer: Any, module: Any, subcommand: str, asked: list[Any]) -> None:
    """Add the callbacks of a recovery where the user gave none of their kind, in the order they depend on.

    Masks come first, so that all others see masked weights only; the result is written after everything else has had
    its say, and checkpoints come last, as Lightning has it. Logs go to the run's folder unless a logger was chosen.
    """
    from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from obsdiff.callbacks.checkpoint import LastCheckpoint
    from obsdiff.callbacks.export import Export
    from obsdiff.callbacks.mask import MaskEnforcement
    from obsdiff.callbacks.samples import SampleGrid, SampleWriter

    folder = module.output / "checkpoints"
    standard: list[Any] = [MaskEnforcement(), *asked, SampleGrid(), Export()]
    if subcommand == "predict":
        standard.append(SampleWriter(module.output / "predictions"))
    standard.append(LastCheckpoint(folder))
    # Lightning's own default checkpoint knows no folder; ours replaces it
    own = [callback for callback in trainer.callbacks if type(callback) is not ModelCheckpoint or callback.dirpath]
    kinds = tuple(type(callback) for callback in own)
    parts = [callback for callback in standard if not issubclass(type(callback), kinds)] + own

    def place(part: Any) -> int:
        late = 3 if isinstance(part, Checkpoint) else 2 if isinstance(part, Export) else 1
        return 0 if isinstance(part, MaskEnforcement) else late

    parts.sort(key=place)
    trainer.callbacks = parts
    if all(isinstance(logger, TensorBoardLogger) and logger.name == "lightning_logs" for logger in trainer.loggers):
        trainer.logger = TensorBoardLogger(str(module.output), name="logs", version="")
