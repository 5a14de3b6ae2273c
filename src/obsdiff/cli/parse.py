"""Options from command line and YAML, and one clear line for what is wrong with them."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from obsdiff.cli.explain import explain, squeezed
from obsdiff.errors import UserError
from obsdiff.paths import user_path
from obsdiff.quiet import quiet_libraries
from obsdiff.yamlfiles import read_yaml, use_core_schema

T = TypeVar("T")


class OneLine:
    """For parsers of jsonargparse: complaints are one line in plain words."""

    program = "obsdiff"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with exit code 2, or raise where a parser inside another one failed."""
        parser: Any = self
        if not parser.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]  # of the parser that this is mixed into
        if ex is not None and (found := user_error_in(ex)) is not None:
            fail(self.program, one_line(found))
        actions = [action for action in parser._actions if action.option_strings]
        several = [
            action.dest for action in actions if re.search(r"list|Sequence|Mapping|dict|tuple", _kind_of(action))
        ]
        fail(self.program, explain(message, [action.dest for action in actions], several))


def _kind_of(action: Any) -> str:
    return str(getattr(action, "_typehint", ""))


def parse_options(
    kind: type[T], program: str, args: Sequence[str] | None, positional: bool = False, example: str = ""
) -> T:
    """An instance of the dataclass ``kind`` from ``args``, over the YAML of ``--config``.

    Args:
        kind: Options dataclass; its docstrings are the help.
        program: Such as "obsdiff prune".
        args: Command line without the program; None takes sys.argv.
        positional: A first argument without a name is the dataclass's first field.
        example: Command lines that the help begins with.
    """
    from dataclasses import fields, is_dataclass

    from jsonargparse import ArgumentParser, Namespace

    class Parser(OneLine, ArgumentParser):
        pass

    use_core_schema()
    given = list(sys.argv[1:] if args is None else args)
    if positional and given and not given[0].startswith("-"):
        given[:1] = [f"--{fields(kind)[0].name}", given[0]]  # type: ignore[arg-type]  # every kind is a dataclass
    summary = kind.__doc__.splitlines()[0] if kind.__doc__ else None
    usage = f"{program} [--config FILE] [--OPTION VALUE ...]" + (f"\n\n{example}" if example else "")
    parser = Parser(prog=program, usage=usage, description=summary, allow_abbrev=False)
    parser.program = program
    parser.add_argument("--config", action="config", help="YAML file with the same keys")
    parser.add_class_arguments(kind)
    try:
        check_config_files(given)
    except UserError as error:
        fail(program, one_line(error))
    try:
        parsed = parser.parse_args(given)
    except (OverflowError, RecursionError) as error:
        fail(program, f"a value is too large: {squeezed(error)}")
    for field in fields(kind):  # type: ignore[arg-type]  # as above
        if is_dataclass(field.default_factory) and not isinstance(parsed[field.name], Namespace):
            shown = squeezed(parsed[field.name])[:60]
            fail(program, f"--{field.name} is {shown!r}; give keys with values, such as {{a: 1}}, or leave it out")
    values: Any = parser.instantiate(parsed)
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]  # as above


def check_config_files(args: Sequence[str]) -> None:
    """Read the files that ``--config`` names before anything slow happens.

    Raises:
        UserError: One is missing, or holds no keys with values.
    """
    for flag, value in zip(args, [*args[1:], ""], strict=False):
        path = value if flag in ("--config", "-c") else flag.partition("=")[2] if flag.startswith("--config=") else None
        if path is not None and "://" not in path:
            if not user_path(path, "--config").exists():
                raise UserError(f"config file {path[:300]!r} not found")
            read_yaml(path, "config")


def fail(program: str, message: str, code: int = 2) -> NoReturn:
    """Print one line and leave with an exit code."""
    shown = message.encode("utf-8", "backslashreplace").decode()  # names of files may hold bytes that are no text
    print(f"{program}: {shown}\n", end="", file=sys.stderr)  # at once: other processes may write to it, too
    sys.exit(code)


LOST = "another process of this run has ended (its own line says why, unless it was killed)"
_LOST = re.compile(
    r"gloo/transport/.*(?:Connection|Broken pipe)|ncclRemoteError|TCPStore.*(?:closed|reset|Broken pipe)", re.DOTALL
)


@dataclass
class Session:
    """A command that runs.

    Attributes:
        kept: Says, when it is interrupted, what is kept and how to go on.
    """

    kept: Callable[[], str] | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def clear_errors(program: str) -> Iterator[Session]:
    """Turn what the user can mend into one line and exit code 2, and Ctrl-C (or SIGTERM) into one line and exit code
    130 (143). A process that its run's other processes cannot be reached from any more ends with one line, too (and
    code 1). Anything else is a defect and keeps its traceback.

    A :class:`UserError` counts wherever it was raised: in a constructor that a parser called, in a worker process.
    """
    session = Session()
    with _raised_on_sigterm():
        try:
            with quiet_libraries():
                yield session
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) and isinstance(stop.__context__, Exception):
                _fail_with(program, stop.__context__, session)  # torchrun does not wait until what failed has said so
            _interrupted(program, stop, session)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning leaves so, with 1
                _interrupted(program, stop.__context__, session)
            raise
        except Exception as error:
            if signal.getsignal(signal.SIGTERM) is _stop:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is said first
            _fail_with(program, error, session)
            raise


@contextmanager
def instantiating() -> Iterator[None]:
    """While a parser makes the objects that its options name: what their constructors refuse is the user's to mend.

    Raises:
        UserError: A constructor raised it, or refused a value in its own way.
    """
    try:
        yield
    except Exception as error:
        if (found := user_error_in(error)) is not None:
            raise found from None
        if isinstance(error, ValueError) and "Does not validate against" in str(error):
            errors = re.findall(r"^ *- (?!Expected a)(.+)", str(error), re.MULTILINE)
            raise UserError(squeezed(errors[0] if errors else error)) from None
        if isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException":
            raise UserError(squeezed(error)) from error
        raise


def _mendable(error: Exception) -> str | None:
    """One line if the user can mend it, else None."""
    if (found := user_error_in(error)) is not None:
        return one_line(found)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{squeezed(error.filename)}: {error.strerror}"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; not imported here
        return squeezed(error)
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return f"out of memory; smaller batches, bfloat16 or gradient checkpointing take less ({squeezed(error)})"
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return squeezed(error)
    return None


def user_error_in(error: BaseException) -> Exception | None:
    """The :class:`UserError` that ``error`` is, was raised from, or brings as text from another process."""
    at: BaseException | None = error
    seen: set[int] = set()
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, UserError):
            return at
        if type(at).__name__ in ("ProcessRaisedException", "_RemoteTraceback") and (found := _of_traceback(str(at))):
            return UserError(found)
        at = at.__cause__
    return None


def one_line(error: Exception) -> str:
    """The message of an error, also of one that a worker process raised: that comes with the worker's traceback."""
    text = str(error)
    return " ".join((_of_traceback(text) or text).split())


def _of_traceback(text: str) -> str:
    found = re.findall(r"^(?:[\w.]+\.)?UserError: (.*(?:\n(?!Traceback|\s+File|$).*)*)", text, re.MULTILINE)
    return str(found[-1]) if found and "Traceback (most recent call last)" in text else ""


def _interrupted(program: str, stop: BaseException, session: Session) -> NoReturn:
    terminated = isinstance(stop, Terminated)
    what = "terminated" if terminated else "interrupted"
    fail(program, _with_kept(what, session), 143 if terminated else 130)


def _with_kept(message: str, session: Session) -> str:
    kept = session.kept() if session.kept is not None else ""
    return f"{message}; {kept}" if kept else message


def _fail_with(program: str, error: Exception, session: Session) -> None:
    """Leave with one line, if ``error`` is worth one."""
    if (message := _mendable(error)) is not None:
        fail(program, message)
    if _of_lost_process(error):
        fail(program, _with_kept(LOST, session), 1)


def _of_lost_process(error: BaseException | None) -> bool:
    """Whether ``error`` is what the ways between processes, gloo's or NCCL's, say where one of them is gone."""
    while error is not None:  # torch and Lightning may have wrapped it
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def _stop(*_: object) -> None:
    raise Terminated


@contextmanager
def _raised_on_sigterm() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated`, so that what Ctrl-C tidies up is tidied up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
