"""``obsdiff compare``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from obsdiff.cli.early import checked_compare
from obsdiff.cli.parse import clear_errors, fail, parse_options
from obsdiff.compare.cells import LeftOut, Unit, part_of, units_of
from obsdiff.compare.options import CompareOptions

PROGRAM = "obsdiff compare"
EXAMPLE = """example: obsdiff compare --config configs/compare/digits.yaml
required: --pipeline, --output (a folder that keeps finished cells), --methods and --patterns"""
RESULT, FAILED = 0, 1
PARENT = "OBSDIFF_COMPARE_PARENT"  # who started a part on this machine
WATCH_S = 1.0


def main(args: Sequence[str] | None = None) -> None:
    """Parse, run what is not finished yet in processes of its own, and report; exit code 1 if a cell failed."""
    given = list(sys.argv[1:] if args is None else args)
    with clear_errors(PROGRAM) as session:
        options = checked_compare(parse_options(CompareOptions, PROGRAM, given, example=EXAMPLE))
        session.kept = lambda: f"finished cells are kept in {options.output}; the same command goes on from there"
        units, left_out = units_of(options)
        mine = part_of(units, options.part)
        if options.part is not None:
            _end_with(os.environ.get(PARENT))
            sys.exit(FAILED if _work(options, mine) else RESULT)
        _announce(options, units, left_out)
        count = min(options.jobs, len(units))
        for at, code in enumerate(_side_by_side(given, options, count)):
            if code < 0:
                print(f"part {at} of {count} was killed by signal {-code}; its other cells are left", file=sys.stderr)
        code = _report(options, units, left_out)
    sys.exit(code)


def _work(options: CompareOptions, units: Sequence[Unit]) -> int:
    """One part, in this process."""
    from obsdiff.compare.run import run_part
    from obsdiff.devices import choose_device

    at = int((options.part or "0/1").partition("/")[0])
    device = choose_device(options.devices[at % len(options.devices)] if options.devices else None)

    def fit(arguments: list[str]) -> None:
        from obsdiff.cli.train import command_line

        command = command_line(command=arguments[0])
        command(args=arguments, trainer_defaults={"num_sanity_val_steps": 0}, save_config_callback=None)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return run_part(options, units, device, options.part, fit, say)


def _side_by_side(given: Sequence[str], options: CompareOptions, count: int) -> list[int]:
    """Run all parts as processes; their exit codes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} | os.environ
    environment[PARENT] = str(os.getpid())
    command = [sys.executable, "-m", "obsdiff.cli.compare", *given]
    parts = [subprocess.Popen([*command, "--part", f"{at}/{count}"], env=environment) for at in range(count)]
    try:
        return [part.wait() for part in parts]
    except BaseException:
        for part in parts:
            part.terminate()
        for part in parts:
            part.wait()
        raise


def _end_with(parent: str | None) -> None:
    """Let this process end when the one that started it is gone, even killed: the next command does its cells then."""

    def watch() -> None:
        while os.getppid() == int(parent or 0):
            time.sleep(WATCH_S)
        os._exit(FAILED)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _announce(options: CompareOptions, units: Sequence[Unit], left_out: Sequence[LeftOut]) -> None:
    rows = len(units) * (1 + len(options.recipes))
    lines = [f"{options.pipeline}: {len(units)} prunes, {rows} rows; finished ones in {options.output} are kept"]
    lines += [f"left out: {found.pattern} by {found.method}, {found.allocation}: {found.reason}" for found in left_out]
    print("\n".join(lines), file=sys.stderr)


def _report(options: CompareOptions, units: Sequence[Unit], left_out: Sequence[LeftOut]) -> int:
    """Write the report, say where it lies; the exit code."""
    from obsdiff.compare.pages import MARKDOWN, PAGE, write_report
    from obsdiff.compare.run import CELLS, Dense, collect
    from obsdiff.export.summary import aligned

    output = Path(options.output)
    rows, missing = collect(options, units, Dense(options.pipeline, "cpu", output, options.evaluation))
    failed = sum(row["error"] is not None for row in rows)
    if not rows:
        fail(PROGRAM, "no cell was finished; what was said above tells why", FAILED)
    write_report(options, rows, left_out, output / CELLS)
    ended = f"{len(rows) - failed} of {len(rows) + missing}" + (f", {failed} failed" if failed else "")
    print(aligned([("cells", ended), ("report", f"{output / MARKDOWN}, {output / PAGE}")]))
    return FAILED if failed or missing else RESULT


if __name__ == "__main__":
    main()
