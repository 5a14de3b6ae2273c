"""``obsdiff inspect``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from obsdiff.cli.early import checked_inspect
from obsdiff.cli.options import InspectOptions
from obsdiff.cli.parse import clear_errors, parse_options

PROGRAM = "obsdiff inspect"
EXAMPLE = """example: obsdiff inspect outputs/digits
required: the folder of a prune run, or a plan file; or --families"""


def main(args: Sequence[str] | None = None) -> None:
    """Parse, read the manifest, print it as a table."""
    with clear_errors(PROGRAM):
        given = [*(sys.argv[1:] if args is None else args)]
        if given[-1:] == ["--families"]:
            given.append("true")
        options = checked_inspect(parse_options(InspectOptions, PROGRAM, given, positional=True, example=EXAMPLE))
        if options.folder is None:
            from obsdiff.export.families import table

            print(table())
            return

        from obsdiff.export.inspection import inspect_run

        print(inspect_run(options.folder))
