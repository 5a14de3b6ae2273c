"""Weights that rest in a file: all is what it is with weights in memory, and memory holds those of one block."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import obsdiff
from obsdiff.allocation import joint
from obsdiff.allocation.fitting import RUN_BYTES, plan_from_configs, plan_loaded
from obsdiff.allocation.shapes import bytes_at_hand, bytes_outside
from obsdiff.allocation.stage import prune_stage
from obsdiff.cli.main import main
from obsdiff.export.memory_report import full_plan, short_plan
from obsdiff.export.run import prune_run
from obsdiff.memory import resident_memory_bytes
from obsdiff.models.content import component_hashes, model_hash
from obsdiff.models.offload import blocks_of, is_offloaded, offload, shelf_of, turn_of
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions, PruningOptions
from obsdiff.pruning.surgery import Edits
from obsdiff.spill import Shelf, in_turn
from tests.conftest import make_pipe
from tests.families.pipelines import PIPELINES, each
from tests.pruning.test_stream import of_family

MAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="reads what of a file is in memory from /proc")


def in_memory(folder):
    """Bytes of mapped files without a name of a folder that are in memory."""
    found, ours = 0, False
    for line in MAPS.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = f" {folder}/" in line and line.endswith("(deleted)")
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def weights_of(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_a_mapped_tensor_is_what_it_was(tmp_path, dtype):
    shelf = Shelf(tmp_path)
    values = [
        torch.arange(15.0).view(3, 5).T.to(dtype),
        torch.ones(()).to(dtype),
        torch.arange(120.0).view(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        torch.arange(12.0).view(3, 4).to(dtype)[:, ::2],
    ]
    for value in values:
        found = shelf.mapped(value)
        assert found.dtype == dtype and found.tolist() == value.tolist()
        assert found.stride() == torch.empty_like(value).stride() and found.data_ptr() % 64 == 0
    empty = torch.empty(0, 3, dtype=dtype)
    assert shelf.mapped(empty).shape == (0, 3) and not list(tmp_path.iterdir())


@linux
def test_file_descriptors_do_not_grow_with_tensors(tmp_path):
    count, shelf = len(os.listdir("/proc/self/fd")), Shelf(tmp_path)
    held = [shelf.mapped(torch.full((5000,), float(value))) for value in range(500)]
    large = shelf.mapped(torch.full((2**25,), -1.0))  # more than a part
    held += [shelf.mapped(torch.full((5000,), float(value))) for value in range(500, 600)]
    assert len(os.listdir("/proc/self/fd")) <= count + 4
    assert all(bool((tensor == value).all()) for value, tensor in enumerate(held)) and bool((large == -1).all())
    shelf.drop()
    assert in_memory(tmp_path) == 0 and float(large[-1]) == -1 and float(held[-1][-1]) == 599


@linux
def test_what_was_read_leaves_memory_and_what_was_written_stays(tmp_path):
    shelf = Shelf(tmp_path)
    one, two = (shelf.mapped(torch.full((2**20,), value)) for value in (1.0, 2.0))
    assert in_memory(tmp_path) == 0
    assert float(one.sum()) == 2**20 and in_memory(tmp_path) == one.nbytes
    one[5] = 7.0
    shelf.drop()
    assert in_memory(tmp_path) == 0 and float(one[5]) == 7.0
    shelf.drop()
    seen = [(float(tensor.sum()), in_memory(tmp_path)) for tensor in in_turn([one, two, torch.ones(3)])]
    assert seen == [(2**20 + 6, one.nbytes), (2**21, two.nbytes), (3.0, 0)]


def test_the_place_of_a_tensor_that_is_gone_is_taken_again(tmp_path):
    shelf = Shelf(tmp_path)
    kept, gone = (shelf.mapped(torch.full((5000,), value)) for value in (1.0, 2.0))
    end, view = shelf._end, gone[:3]
    del gone
    assert bool((shelf.mapped(torch.full((5000,), 3.0)) == 3).all()) and shelf._end > end  # a view holds the place
    assert view.tolist() == [2.0] * 3
    end = shelf._end
    shelf.close()  # tensors outlive it
    assert bool((kept == 1).all())
    shelf = Shelf(tmp_path)
    for value in range(4):  # each is gone before the next one comes
        assert bool((shelf.mapped(torch.full((5000,), float(value))) == value).all())
    assert shelf._end < 3 * 5000 * 4


@pytest.mark.parametrize("name", each(PIPELINES))
def test_a_streamed_prune_is_the_same(name, tmp_path):
    plain, told, pattern = of_family(name)
    pipe, *_ = of_family(name)
    wanted = obsdiff.prune(plain, pattern, statistics=obsdiff.stream(plain, told))
    offload(pipe, "cpu", tmp_path / "new")
    found = obsdiff.prune(pipe, pattern, statistics=obsdiff.stream(pipe, told), solved=tmp_path / "solved")
    assert found.layer_error == wanted.layer_error
    for model, other in zip(subject_of(pipe).components.values(), subject_of(plain).components.values(), strict=True):
        assert same(model.state_dict(), other.state_dict())
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "pattern", ["unstructured:0.5", "2:4", "structured:0.5", "depth:1+unstructured:0.5", "rank:0.7"]
)
@pytest.mark.parametrize("allocation", ["uniform", "measured"])
def test_all_that_needs_a_denoiser_whole_can_be_done(prompts, images, tmp_path, pattern, allocation):
    if allocation == "measured" and pattern == "2:4":
        pattern = "unstructured:0.7"
    asked = PruningOptions(pattern=pattern, allocation=allocation)
    plain, pipe = make_pipe(), make_pipe()
    wanted = prune_stage(plain, asked, prompts)
    offload(pipe, "cpu", tmp_path)
    found = prune_stage(pipe, asked, prompts)
    assert found.layer_error == wanted.layer_error
    assert same(weights_of(pipe), weights_of(plain)) and torch.equal(images(pipe), images(plain))
    obsdiff.save_pipeline(pipe, tmp_path / "saved", found)
    assert found.masks.keys() == wanted.masks.keys()
    assert same(weights_of(obsdiff.load_pipeline(tmp_path / "saved")), weights_of(plain))


def test_it_is_the_same_pipeline_and_not_offloaded(tmp_path, images):
    plain, pipe = make_pipe(), make_pipe()
    assert offload(pipe, "cpu", tmp_path) is pipe
    assert component_hashes(pipe) == component_hashes(plain) and torch.equal(images(pipe), images(plain))
    assert turn_of(pipe.transformer) is not None and not is_offloaded(pipe.transformer)
    assert shelf_of(pipe.transformer) is not None and shelf_of(plain.transformer) is None
    with pytest.raises(obsdiff.UserError, match="is offloaded already"):
        offload(pipe, "cpu", tmp_path)
    pipe.remove_all_hooks()
    assert shelf_of(pipe.transformer) is None and torch.equal(images(pipe), images(plain))
    with pytest.raises(obsdiff.UserError, match="for runs on the cpu; on cuda leave the folder out"):
        offload(plain, "cuda", tmp_path)


@linux
def test_memory_holds_one_block_of_the_weights(tmp_path):
    pipe = obsdiff.load_pipeline("digits-sd3")
    blocks = blocks_of(pipe.transformer)
    around = 2**17  # the system brings 64 KiB at a time
    pages = [sum(-(-p.nbytes // 4096) * 4096 for p in block.parameters()) + around for block in blocks]
    assert sum(pages) > 3 * max(pages)
    offload(pipe, "cpu", tmp_path)
    most = []
    for at, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, at=at: most.append((at, in_memory(tmp_path))))
    pipe("seven", num_inference_steps=2)
    assert {at for at, _ in most} == set(range(len(blocks)))
    assert all(0 < held <= pages[at] for at, held in most)
    most.clear()
    obsdiff.prune(pipe, "unstructured:0.5", statistics=obsdiff.calibrate(pipe, ["a seven", "a two"], steps=2))
    assert most and all(0 < held <= pages[at] for at, held in most)
    model_hash(pipe.transformer)
    assert in_memory(tmp_path) <= max(pages)


@linux
def test_replaced_weights_and_those_in_their_place_take_none(tmp_path, prompts, monkeypatch):
    pipe = make_pipe()
    dense = weights_of(pipe)
    offload(pipe, "cpu", tmp_path)
    largest = max(tensor.nbytes for tensor in dense.values())
    statistics, held = obsdiff.calibrate(pipe, prompts), []
    real = obsdiff.pruning.surgery.Edits.set_weight

    def seen(self, layer, weight, bias=None):
        real(self, layer, weight, bias)
        held.append(in_memory(tmp_path))
        if len(held) == 12:
            raise RuntimeError("gone")

    monkeypatch.setattr(obsdiff.pruning.surgery.Edits, "set_weight", seen)
    with pytest.raises(RuntimeError, match="gone"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics, solved=tmp_path / "solved")
    assert len(held) == 12 and max(held) <= largest + 4096
    assert same(weights_of(pipe), dense)


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch, images):
    pipe, wanted = make_pipe(), images(make_pipe())
    with monkeypatch.context() as patched:
        patched.setattr("obsdiff.files.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(obsdiff.UserError, match="its disk has 0 MiB left"):
            offload(pipe, "cpu", tmp_path)
    real, put = Shelf.put, []

    class Full:
        def __init__(self, file):
            self.seek, self.truncate, self.fileno, self.close = file.seek, file.truncate, file.fileno, file.close

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def until_full(self, tensor):
        put.append(tensor)
        if len(put) == 5:
            self._file = Full(self._file)
        return real(self, tensor)

    monkeypatch.setattr(Shelf, "put", until_full)
    with pytest.raises(obsdiff.UserError, match=r"cannot write .*: No space left"):
        offload(pipe, "cpu", tmp_path)
    assert len(put) == 5 and turn_of(pipe.transformer) is None and torch.equal(images(pipe), wanted)


def test_the_command(pipe_folder, tmp_path, capsys):
    given = ["prune", "--pipeline", str(pipe_folder), "--pattern", "unstructured:0.5", "--device", "cpu",
             "--calibration.num_prompts", "4", "--evaluation.num_images", "4"]  # fmt: skip
    main([*given, "--output", str(tmp_path / "plain")])
    capsys.readouterr()
    main([*given, "--output", str(tmp_path / "out" / "disk"), "--weights_on_disk", "true"])
    assert "weights rest on the disk: " in capsys.readouterr().err
    plain, disk = (json.loads((tmp_path / at / "report.json").read_text()) for at in ("plain", "out/disk"))
    assert disk["weights_on_disk"] and not plain["weights_on_disk"] and not disk["offload"]
    assert disk["layer_error"] == plain["layer_error"]
    assert disk["evaluation"]["pruned"]["mse"] == plain["evaluation"]["pruned"]["mse"]
    saved = [obsdiff.load_pipeline(tmp_path / at) for at in ("plain", "out/disk")]
    assert same(*map(weights_of, saved))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["disk"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--weights_on_disk", "true", "--device", "cuda", "--dry_run", "true"],
            "--weights_on_disk is for runs on the cpu",
        ),
        (["--offload", "true", "--device", "cpu", "--calibration.streamed", "true"], "give --weights_on_disk true"),
        (["--weights_on_disk", "true", "--reconstruction.steps", "2"], "leave it out, or --weights_on_disk"),
    ],
)
def test_bad_requests(pipe_folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), *more])
    assert message in capsys.readouterr().err


def test_the_benchmark_refuses_a_device(capsys, monkeypatch):
    monkeypatch.setattr("obsdiff.devices.choose_device", lambda name, **_: name)
    with pytest.raises(SystemExit):
        main(["bench", "prune", "--weights_on_disk", "true", "--preset", "sd35-large"])
    assert "--weights_on_disk is for runs on the cpu, and this one is on cuda" in capsys.readouterr().err


def test_a_run_of_another_pipeline_is_refused(pipe, pipe_folder, tmp_path):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output=str(tmp_path / "out"), pattern="unstructured:0.5", weights_on_disk=True
    )
    with pytest.raises(obsdiff.UserError, match=r"call obsdiff\.offload\(pipe, \"cpu\", folder\) before"):
        prune_run(pipe, asked)


@linux
def test_trials_of_an_allocation_rest_there_too(tmp_path, prompts, monkeypatch):
    pipe, held = make_pipe(), []
    offload(pipe, "cpu", tmp_path)

    class Seen(Edits):
        def undo(self):
            held.extend(owner.weight.data_ptr() in obsdiff.spill._pages for owner, _ in self._old.values())
            super().undo()

    monkeypatch.setattr(joint, "Edits", Seen)
    prune_stage(pipe, PruningOptions(pattern="unstructured:0.5", allocation="measured"), prompts)
    assert len(held) > 10 and all(held)


def test_a_run_plans_what_it_takes_beside_what_is_loaded(pipe_folder, tmp_path):
    pipe = offload(obsdiff.load_pipeline(pipe_folder), "cpu", tmp_path)
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", weights_on_disk=True,
        evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    model_hash(pipe.transformer)
    subject = subject_of(pipe)
    planned = plan_loaded(subject, asked).memory
    there = next(moment for moment in planned.moments if moment.name.startswith("calibrating"))
    outside = bytes_outside(subject)
    assert there.host["process"] + outside == pytest.approx(resident_memory_bytes() + RUN_BYTES, rel=0.05)
    assert there.device["weights"] == bytes_at_hand(subject)["denoiser"] > outside > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_the_plan_has_one_block_and_names_it_where_memory_is_short(pipe_folder, monkeypatch, streamed):
    monkeypatch.setattr("obsdiff.allocation.fitting.resident_memory_bytes", lambda: 0)
    monkeypatch.setattr("obsdiff.allocation.fitting.RUN_BYTES", 0)
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform",
        calibration=CalibrationOptions(
            streamed=streamed, calls_on_disk=streamed, batch_size=1, packages=None if streamed else 1
        ),
        evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    there, away = (plan_from_configs(replace(asked, weights_on_disk=on), "cpu") for on in (False, True))
    weights, held = sum(there.shapes.weights.values()), away.shapes.at_hand
    for before, after in zip(there.memory.moments, away.memory.moments, strict=True):
        what = "text" if after.name == "encoding prompts" else "denoiser"
        whole = after.name in ("loading", "writing")
        assert after.name == before.name and after.device["weights"] == (weights if whole else held[what])
    assert sum(held.values()) < weights and away.memory.host_bytes < there.memory.host_bytes
    assert away.memory.resting_bytes > weights and there.memory.resting_bytes == 0
    assert "resting weights" in full_plan(away) and "resting weights" not in full_plan(there)
    assert "weights rest on the disk" in short_plan(away) and "weights rest" not in short_plan(there)
    assert any("to read blocks" in note for note in away.notes)
    short = replace(asked, host_memory=away.memory.host_bytes, dtype="bfloat16")
    half = plan_from_configs(replace(asked, dtype="bfloat16", weights_on_disk=True), "cpu").memory.host_bytes
    with pytest.raises(obsdiff.UserError, match=r"would fit: --weights_on_disk true \("):
        plan_from_configs(replace(short, host_memory=half), "cpu")
    assert plan_from_configs(replace(short, host_memory=half, weights_on_disk=True), "cpu").memory.host_bytes == half
    with pytest.raises(obsdiff.UserError, match="this prune takes at least"):
        plan_from_configs(replace(asked, host_memory=weights - 1), "cpu")


@linux
@pytest.mark.slow
def test_the_peak_of_a_prune_is_lower_by_the_weights(tmp_path):
    """In processes of their own: five blocks of six, dense and pruned, of a model of 219 MB."""
    command = [sys.executable, "-c", "from obsdiff.cli.main import main; main()", "bench", "prune", "--threads", "1",
               "--steps", "1", "--num_prompts", "2"]  # fmt: skip
    found = {}
    for on in ("false", "true"):
        done = subprocess.run(
            [*command, "--weights_on_disk", on], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        found[on] = json.loads(done.stdout)
    assert found["true"]["mean_layer_error"] == found["false"]["mean_layer_error"]
    assert found["false"]["peak_memory_bytes"] - found["true"]["peak_memory_bytes"] > 150e6
    assert 0.8 < found["true"]["planned_memory_bytes"] / found["true"]["peak_memory_bytes"] < 1.2
