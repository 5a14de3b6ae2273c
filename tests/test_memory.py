"""What becomes of work that memory does not hold."""

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from obsdiff import memory
from obsdiff.allocation import stage
from obsdiff.bench import prune as bench_prune
from obsdiff.cli.main import main
from obsdiff.errors import UserError
from obsdiff.export import run as export_run
from obsdiff.memory import is_out_of_memory, resident_memory_bytes, trim_memory, within_memory
from obsdiff.pruning import folder
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.training import stage as training_stage

TOO_MUCH = 2**55  # bytes; no machine has them


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is free")
def test_freed_tensors_go_back_to_the_system():
    torch.ones(2**22)  # once one of 16 MiB was freed, glibc takes smaller ones out of what it keeps
    tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
    last = torch.ones(2**18)  # above them, so that freeing them leaves a hole
    del tensors
    before = resident_memory_bytes()
    trim_memory()
    assert before - resident_memory_bytes() > 150 * 2**20 and float(last[0]) == 1


KEPT = """
import torch
from obsdiff.memory import freed_at_once, kept_meanwhile, resident_memory_bytes, trim_memory
def kept(above=True):
    tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
    last = torch.ones(2**18) if above else None  # keeps them from being the end of the heap
    del tensors
    found = resident_memory_bytes()
    trim_memory()
    print((found - resident_memory_bytes()) // 2**20)
with freed_at_once():
    kept()
    with kept_meanwhile():
        kept()
with freed_at_once(False):
    kept()
try:
    with freed_at_once():
        raise RuntimeError
except RuntimeError:
    kept()
with kept_meanwhile():
    kept(above=False)
before = resident_memory_bytes()
with kept_meanwhile():
    tensors = [torch.ones(2**18) for _ in range(200)]
    del tensors
print((resident_memory_bytes() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is free")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1000000000"}])
def test_what_is_freed_goes_back_at_once_or_is_kept_as_it_is_asked_for(own):
    """In MiB of 200, in a process that has no holes yet."""
    told = {"check": True, "capture_output": True, "text": True, "env": os.environ | own}
    found = map(int, subprocess.run([sys.executable, "-c", KEPT], **told).stdout.split())
    at_once, within, unasked, after, meanwhile, left = found
    assert min(unasked, after, meanwhile) > 150 and left < 20
    if own:  # who started the process knows better
        assert min(at_once, within) > 150
    else:
        assert max(at_once, within) < 20


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("command", ["prune", "bench", "fit"])
def test_a_streamed_prune_frees_at_once_from_before_it_loads_anything(tmp_path, monkeypatch, command, streamed):
    seen = []

    @contextmanager
    def freeing(asked=True, *, large=False):
        seen.append(asked and not large)
        yield
        seen.append("left")

    def load(*_, **__):
        seen.append("loaded")
        raise KeyError

    monkeypatch.setattr(memory, "freed_at_once", freeing)
    monkeypatch.setattr(training_stage, "freed_at_once", freeing)
    monkeypatch.setattr(folder, "load_pipeline", load)
    monkeypatch.setattr(training_stage, "load_pipeline", load)
    monkeypatch.setattr(bench_prune, "build", load)
    told = ["--pattern", "unstructured:0.5"]
    with pytest.raises(KeyError):
        if command == "prune":
            more = ["--calibration.streamed", str(streamed).lower(), "--allocation", "uniform"]
            main(["prune", "--pipeline", "digits-sd3", "--output", str(tmp_path / "out"), *told, *more])
        elif command == "bench":
            main(["bench", "prune", "--preset", "sd3-tiny-cpu", *told, "--streamed", str(streamed).lower()])
        else:
            calibration = CalibrationOptions(streamed=streamed)
            options = PruningOptions(pattern=told[1], allocation="uniform", calibration=calibration)
            training_stage.start_from("digits-sd3", options, tmp_path, "cpu", False, lambda _: None)
    assert seen == [streamed, "loaded"]


@pytest.mark.parametrize("command", ["prune", "bench"])
def test_with_weights_on_a_disk_large_tensors_go_back_at_once(tmp_path, monkeypatch, command):
    seen = []

    def freeing(asked=True, *, large=False):
        seen.append((asked, large))
        raise KeyError

    monkeypatch.setattr(memory, "freed_at_once", freeing)
    given = {"prune": ["--pipeline", "digits-sd3", "--output", str(tmp_path / "out"), "--device", "cpu"], "bench": []}
    main_name = ["bench", "prune"] if command == "bench" else ["prune"]
    with pytest.raises(KeyError):
        main([*main_name, *given[command], "--pattern", "unstructured:0.5", "--weights_on_disk", "true"])
    assert seen == [(True, True)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is free")
def test_large_ones_alone():
    told = KEPT.split("with freed_at_once():")[0].replace("2**18) for _ in range(200)]", "size) for _ in range(200)]")
    told = told.replace("above=True", "size, above=True")
    told += "with freed_at_once(large=True):\n    kept(2**21)\n    kept(2**18)\n"  # holes would be filled
    found = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True).stdout.split()
    assert int(found[0]) < 20 and int(found[1]) > 150


def test_both_kinds_are_recognised():
    with pytest.raises(RuntimeError) as of_host:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(of_host.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(("holds", "tried"), [(8, [8]), (4, [8, 4]), (3, [8, 4])])
def test_once_more_in_half_of_the_batches(holds, tried, capsys):
    sizes = []

    def work(size):
        sizes.append(size)
        return "done" if size <= holds else torch.empty(TOO_MUCH, dtype=torch.uint8)

    if holds >= tried[-1]:
        assert within_memory(work, 8, "drawing", "less is less") == "done"
    else:
        with pytest.raises(UserError, match=r"out of memory while drawing in batches of 4; less is less .*allocat"):
            within_memory(work, 8, "drawing", "less is less")
    assert sizes == tried
    assert ("once more with 4" in capsys.readouterr().err) is (len(tried) == 2)


def test_a_single_one_is_not_halved_and_other_errors_pass():
    with pytest.raises(UserError, match="in batches of 1"):
        within_memory(lambda size: torch.empty(TOO_MUCH, dtype=torch.uint8), 1, "drawing", "")
    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(lambda size: torch.ones(2, 3) @ torch.ones(2, 3), 8, "drawing", "")


def test_a_prune_goes_on_with_smaller_batches(pipe_folder, tmp_path, monkeypatch, capsys):
    """To the same masks; calibration and drawing, each once."""
    sizes = {"calibrate": [], "draw": []}

    def short(name, real, at):
        def work(*args, **options):
            size = options["batch_size"] if at is None else args[at]
            sizes[name].append(size)
            return real(*args, **options) if size <= 2 else torch.empty(TOO_MUCH, dtype=torch.uint8)

        return work

    arguments = ["prune", "--pipeline", str(pipe_folder), "--pattern", "2:4", "--calibration.num_prompts", "4"]
    arguments += ["--evaluation.num_images", "4", "--calibration.batch_size", "4", "--evaluation.batch_size", "4"]
    main([*arguments, "--output", str(tmp_path / "plenty")])
    monkeypatch.setattr(stage, "calibrate", short("calibrate", stage.calibrate, None))
    monkeypatch.setattr(export_run, "sample_shared", short("draw", export_run.sample_shared, 3))
    main([*arguments, "--output", str(tmp_path / "little")])
    assert sizes == {"calibrate": [4, 2], "draw": [4, 2, 4, 2]}
    said = capsys.readouterr().err
    assert "out of memory while pruning in batches of 4; once more with 2" in said
    plenty, little = (json.loads((tmp_path / way / "report.json").read_text()) for way in ("plenty", "little"))
    assert little["layer_error"]["mean"] == pytest.approx(plenty["layer_error"]["mean"], rel=1e-4)
    monkeypatch.setattr(stage, "calibrate", lambda *_, **__: torch.empty(TOO_MUCH, dtype=torch.uint8))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output", str(tmp_path / "none")])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obsdiff prune: ")]
    assert ended.value.code == 2 and "in batches of 2; --calibration.streamed true holds" in line
    assert "on a cpu --weights_on_disk true one block of them" in line
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only getrusage knows")
def test_the_peak_is_not_that_of_what_started_the_process():
    """Which is what getrusage says of a process that another one became."""
    told = "import obsdiff.memory as m, resource; "
    told += "print(m.peak_memory_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    large = f"import os, sys; held = b'1' * 2**31; os.execv(sys.executable, [sys.executable, '-c', {told!r}])"
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    peak, counted = map(int, done.stdout.split())
    assert 2**27 < peak < 2**31 <= counted
