"""``obsdiff train``: Lightning's own command line over obsdiff's modules."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from obsdiff.cli.parse import OneLine, Session, clear_errors, instantiating
from obsdiff.cli.train_arguments import check_arguments, check_trainer, last_checkpoint, reading_checkpoint, usage
from obsdiff.yamlfiles import use_core_schema

PROGRAM = "obsdiff train"


def main(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; see ``train.py fit --help``."""
    with clear_errors(PROGRAM) as session:
        check_arguments(sys.argv[1:] if args is None else args)  # cheap mistakes before costly imports
        command_line(session)(
            save_config_kwargs={"overwrite": True}, trainer_defaults={"num_sanity_val_steps": 0}, args=args
        )


def command_line(session: Session | None = None) -> Any:
    """Lightning's command line; a recovery gets what it needs (masks, budget, checkpoints, export) added.

    Args:
        session: Is told what an interrupted run keeps.
    """
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from obsdiff.callbacks.budget import Budget
    from obsdiff.callbacks.ema import EMA
    from obsdiff.training.recovery import Recovery

    use_core_schema()

    class Parser(OneLine, LightningArgumentParser):
        program = PROGRAM

    class CommandLine(LightningCLI):
        def init_parser(self, **kwargs: Any) -> Any:
            self.parser_class = Parser
            return super().init_parser(allow_abbrev=False, **kwargs)

        def setup_parser(self, *args: Any, **kwargs: Any) -> None:
            super().setup_parser(*args, **kwargs)
            self.parser.usage = usage()
            for name, parser in getattr(self, "_subcommand_parsers", {}).items():
                parser.usage = usage(name)

        def _parse_ckpt_path(self) -> None:
            path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
            with reading_checkpoint(path):
                super()._parse_ckpt_path()

        def _set_seed(self) -> None:
            with instantiating():
                super()._set_seed()

        def instantiate_classes(self) -> None:
            with instantiating():
                super().instantiate_classes()

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_class_arguments(Budget, "budget")
            parser.add_subclass_arguments(EMA, "ema", required=False)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            if self.subcommand == "fit":
                check_trainer(trainer)
            if isinstance(self.model, Recovery):
                if session is not None:
                    session.kept = partial(last_checkpoint, self.model.output)
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
