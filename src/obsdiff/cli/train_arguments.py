"""What can be said about the arguments of ``obsdiff train`` without importing Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from obsdiff.cli.explain import nearest
from obsdiff.cli.parse import check_config_files
from obsdiff.errors import UserError

SUBCOMMANDS = ("fit", "validate", "test", "predict")
ROOTS = (
    "help", "config", "print_config", "seed_everything", "trainer", "model", "data", "budget", "ema", "optimizer",
    "lr_scheduler", "dry_run", "device_memory", "host_memory", "ckpt_path", "weights_only", "verbose",
    "return_predictions",
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


def last_checkpoint(output: Path) -> str:
    """What an interrupted run has kept, and how to go on."""
    path, pruned = output / "checkpoints" / "last.ckpt", output / "pruned"
    if path.is_file():
        return f"the last checkpoint is {path}; go on with the same command and --ckpt_path {quote(str(path))}"
    if (pruned / "pruning.json").is_file():
        return f"no checkpoint was written yet; the pruned pipeline in {pruned} is kept, start the same command again"
    return f"no checkpoint was written to {path.parent} yet"
