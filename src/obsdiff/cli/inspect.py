"""``obsdiff inspect``."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.cli.options import InspectOptions
from obsdiff.cli.parse import clear_errors, parse_options


def main(args: Sequence[str] | None = None) -> None:
    """Parse, read the manifest, print it as a table."""
    options = parse_options(InspectOptions, "obsdiff inspect", args, positional=True)
    with clear_errors("obsdiff inspect"):
        from obsdiff.export.inspection import inspect_run

        print(inspect_run(options.folder))
