"""The ``obsdiff`` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

from obsdiff.cli.explain import nearest

COMMANDS = {
    "prune": ("obsdiff.cli.prune", "prune a pipeline in one shot and measure the result"),
    "train": ("obsdiff.cli.train", "train with Lightning: fit, validate, test, predict"),
    "evaluate": ("obsdiff.cli.evaluate", "measure a pipeline against the dense one, prompts and real images"),
    "compare": ("obsdiff.cli.compare", "compare methods at equal cost, and report with intervals"),
    "sample": ("obsdiff.cli.sample", "draw images from a pipeline, pruned or not"),
    "inspect": ("obsdiff.cli.inspect", "show what was done to a pruned pipeline, layer by layer"),
    "bench": ("obsdiff.cli.bench", "measure the speed of pruning; one JSON line"),
}


def usage() -> str:
    """The overview that ``obsdiff --help`` prints."""
    lines = [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: obsdiff COMMAND [options]",
            "",
            "Prune diffusion pipelines and get pipelines back that diffusers loads.",
            "",
            *lines,
            "",
            "obsdiff COMMAND --help lists the options; all take --config FILE.yaml plus overrides.",
        ]
    )


def main(args: list[str] | None = None) -> None:
    """Run one subcommand; exit code 2 for anything the user can mend."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    if args[0] == "--version":
        from obsdiff.versions import versions

        print(versions()["obsdiff"])
        return
    if args[0] not in COMMANDS:
        hint = nearest(args[0], COMMANDS)
        print(f"obsdiff: unknown command {args[0][:80]!r}; choose one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        sys.exit(2)
    import_module(COMMANDS[args[0]][0]).main(args[1:])
