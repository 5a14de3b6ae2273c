"""Options from command line and YAML, and one clear line for what is wrong with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from obsdiff.errors import UserError
from obsdiff.quiet import quiet_libraries

T = TypeVar("T")


def parse_options(kind: type[T], program: str, args: Sequence[str] | None, positional: bool = False) -> T:
    """An instance of the dataclass ``kind`` from ``args``, over the YAML of ``--config``.

    Args:
        kind: Options dataclass; its docstrings are the help.
        program: Such as "obsdiff prune".
        args: Command line without the program; None takes sys.argv.
        positional: A first argument without a name is the dataclass's first field.
    """
    from dataclasses import fields

    from jsonargparse import ArgumentParser

    class OneLineParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(program, f"{' '.join(str(message).split())} (see {program} --help)")

    given = list(sys.argv[1:] if args is None else args)
    if positional and given and not given[0].startswith("-"):
        given[:1] = [f"--{fields(kind)[0].name}", given[0]]  # type: ignore[arg-type]  # every kind is a dataclass
    parser = OneLineParser(prog=program, description=kind.__doc__.splitlines()[0] if kind.__doc__ else None)
    parser.add_argument("--config", action="config", help="YAML file with the same keys")
    parser.add_class_arguments(kind)
    _check_config_files(given, program)
    config = parser.parse_args(given)
    values: Any = parser.instantiate_classes(config)
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]  # as above


def _check_config_files(args: Sequence[str], program: str) -> None:
    for flag, value in zip(args, [*args[1:], ""], strict=False):
        path = value if flag == "--config" else flag.partition("=")[2] if flag.startswith("--config=") else None
        if path is not None and not Path(path).is_file():
            fail(program, f"config file {path!r} not found")


def fail(program: str, message: str) -> NoReturn:
    """Print one line and leave with exit code 2."""
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def clear_errors(program: str) -> Iterator[None]:
    """Turn a :class:`UserError` into one line and exit code 2; anything else is a defect and keeps its traceback."""
    try:
        with quiet_libraries():
            yield
    except UserError as error:
        fail(program, " ".join(str(error).split()))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
