"""``obsdiff inspect``."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.cli.early import checked_inspect
from obsdiff.cli.options import InspectOptions
from obsdiff.cli.parse import clear_errors, parse_options

PROGRAM = "obsdiff inspect"
EXAMPLE = """example: obsdiff inspect outputs/digits
required: the folder of a prune run, or a plan file"""


def main(args: Sequence[str] | None = None) -> None:
    """Parse, read the manifest, print it as a table."""
    with clear_errors(PROGRAM):
        options = checked_inspect(parse_options(InspectOptions, PROGRAM, args, positional=True, example=EXAMPLE))

        from obsdiff.export.inspection import inspect_run

        print(inspect_run(options.folder))
