"""What can be said about the arguments of ``obsdiff train`` without importing Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obsdiff.cli.explain import nearest, squeezed
from obsdiff.cli.parse import check_config_files
from obsdiff.errors import UserError
from obsdiff.paths import user_path

SUBCOMMANDS = ("fit", "validate", "test", "predict")
ROOTS = (
    "help", "config", "print_config", "seed_everything", "trainer", "model", "data", "budget", "ema", "optimizer",
    "lr_scheduler", "ckpt_path", "weights_only", "verbose", "return_predictions",
)  # fmt: skip


def usage(subcommand: str = "{" + ",".join(SUBCOMMANDS) + "}") -> str:
    """What the help begins with."""
    one = "fit" if subcommand.startswith("{") else subcommand
    return f"""obsdiff train {subcommand} --config FILE [--OPTION VALUE ...]

examples:
  obsdiff train {one} --config configs/recover/distill.yaml
  obsdiff train {one} --config configs/recover/finetune.yaml --model.output outputs/mine --budget.steps 1000"""


def check_arguments(args: Sequence[str]) -> None:
    """Refuse what needs no model to refuse: no such subcommand, option or config file.

    Raises:
        UserError: Naming the nearest.
    """
    words = [arg for arg in args if not arg.startswith("-")]
    if not any(arg in ("-h", "--help") or arg.startswith("--print_config") for arg in args):
        if not args:
            raise UserError(f"say what to run: {', '.join(SUBCOMMANDS)}, such as obsdiff train fit --config FILE.yaml")
        if not args[0].startswith("-") and args[0] not in SUBCOMMANDS:
            hint = nearest(args[0], SUBCOMMANDS)
            raise UserError(f"unknown subcommand {args[0][:80]!r}; choose one of {', '.join(SUBCOMMANDS)}{hint}")
        if not set(words) & set(SUBCOMMANDS):
            raise UserError(f"say what to run before the options: {', '.join(SUBCOMMANDS)}")
    for arg in args:
        name = arg.removeprefix("--").partition("=")[0]
        root = name.split(".")[0].rstrip("+")
        if arg.startswith("--") and name and root not in ROOTS:
            hint = nearest(root, ROOTS).replace("mean ", "mean --")
            raise UserError(f"unknown option --{name[:80]}{hint}")
    check_config_files(args)


@contextmanager
def reading_checkpoint(path: str | None) -> Iterator[None]:
    """While a checkpoint that the user named is read for the first time.

    Raises:
        UserError: It is not there, or damaged.
    """
    named = path is not None and path not in ("last", "best", "hpc") and "://" not in path
    if named and not user_path(str(path), "ckpt_path").exists():
        raise UserError(f"checkpoint {path} not found; give a file of a run's checkpoints folder, or last")
    try:
        yield
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise UserError(
            f"checkpoint {path} is damaged or none ({squeezed(error)[:80]}); give another one of its folder"
        ) from error


def check_trainer(trainer: Any) -> None:
    """Refuse a training that cannot begin or never ends an epoch.

    Raises:
        UserError: Naming the option.
    """
    for name in ("max_steps", "max_epochs", "val_check_interval"):
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name} is 0; it must be more than that, or left out")


def last_checkpoint(output: Path) -> str:
    """What an interrupted run has kept, and how to go on."""
    path = output / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return f"no checkpoint was written to {path.parent} yet"
    return f"the last checkpoint is {path}; go on with the same command and --ckpt_path {path}"
