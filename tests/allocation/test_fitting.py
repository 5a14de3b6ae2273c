"""A prune that is fitted into the memory there is, or refused with what would fit."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest

from obsdiff.allocation.fitting import Room, plan_from_configs, plan_loaded
from obsdiff.errors import UserError
from obsdiff.export.memory_report import full_plan, short_plan
from obsdiff.models.subject import subject_of
from obsdiff.numbers import bytes_text
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions, ScanOptions

PLAIN = PruneOptions(
    pipeline="",
    output="unused",
    pattern="unstructured:0.5",
    allocation="uniform",
    calibration=CalibrationOptions(num_prompts=16, batch_size=8),
    evaluation=EvaluationOptions(num_images=8, batch_size=8),
)


@pytest.fixture
def options(pipe_folder):
    return replace(PLAIN, pipeline=str(pipe_folder))


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The process counts for nothing, so that limits are of what is pruned."""
    monkeypatch.setattr("obsdiff.allocation.fitting.resident_memory_bytes", lambda: 0)
    monkeypatch.setattr("obsdiff.allocation.fitting.RUN_BYTES", 0)
    monkeypatch.setattr("obsdiff.allocation.fitting.products_per_s", cache(lambda device: 1e11))


def test_without_limits_everything_stays_as_it_was_asked_for(options):
    planned = plan_from_configs(options, "cpu")
    assert planned.options == options
    assert planned.memory.batches.prompts == 8 and planned.memory.batches.images == 8
    assert len(planned.memory.batches.packages) == 1
    assert planned.time is not None and planned.time.total_s > 0


def test_configs_and_weights_give_the_same_plan(options, pipe):
    from_configs = plan_from_configs(options, "cpu").memory
    loaded = plan_loaded(subject_of(pipe), options).memory
    assert loaded.host_bytes == pytest.approx(from_configs.host_bytes, rel=0.05)


def test_recorded_calls_go_to_the_disk_where_the_host_does_not_hold_them(options, monkeypatch):
    none = replace(options.evaluation, num_images=0)
    calibration = replace(options.calibration, streamed=True, batch_size=1, num_prompts=64)
    options = replace(options, calibration=calibration, evaluation=none)
    held = plan_from_configs(options, "cpu")
    assert not held.options.calibration.calls_on_disk and held.memory.batches.on_disk == 0
    away = plan_from_configs(replace(options, host_memory=held.memory.host_bytes - 1), "cpu")
    assert away.options.calibration == replace(calibration, calls_on_disk=True)
    assert held.memory.host_bytes - away.memory.host_bytes == away.memory.batches.on_disk > 0
    told = f"recorded calls meanwhile {bytes_text(away.memory.batches.on_disk)}"
    assert told in full_plan(away)
    assert "calls meanwhile" not in full_plan(held) and "calls wait" not in short_plan(held)
    assert f"recorded calls wait on the disk: {bytes_text(away.memory.batches.on_disk)}" in short_plan(away)
    monkeypatch.setenv("WORLD_SIZE", "4")
    together = plan_from_configs(replace(options, calibration=replace(calibration, calls_on_disk=True)), "cpu")
    assert "note: memory is that of each process, what lies on the disk of all" in full_plan(together)
    shared = together.memory
    pruned = sum(site.weights for site in together.shapes.sites)
    assert shared.kept_bytes - away.memory.kept_bytes == 3 * (4 * pruned + -(-pruned // 8))
    assert shared.batches.on_disk == away.memory.batches.on_disk  # all processes write
    assert shared.batches.recorded == pytest.approx(away.memory.batches.recorded / 4, rel=0.01)


def test_batches_become_smaller_before_packages_become_more(options):
    whole = plan_from_configs(options, "cpu").memory.host_bytes
    limited = plan_from_configs(replace(options, host_memory=whole - 1), "cpu")
    assert limited.memory.host_bytes < whole
    batches = limited.memory.batches
    assert len(batches.packages) == 1 and (batches.prompts < 8 or batches.images < 8)
    assert limited.options.evaluation.batch_size == batches.images
    assert limited.options.calibration.batch_size == batches.prompts


@pytest.mark.slow
def test_stages_are_gone_through_where_nobody_said_how_many_packages(pipe_folder, tmp_path):
    folder = tmp_path / "wide"  # whose Hessians outweigh the weights that change: few rows, many columns
    shutil.copytree(pipe_folder, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    layers = ["transformer_blocks.*.ff*.net.2"]
    config |= {"attention_head_dim": 16, "caption_projection_dim": 64, "num_layers": 6}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    small = replace(
        PLAIN,
        pipeline=str(folder),
        include=layers,
        calibration=replace(PLAIN.calibration, batch_size=1),
        evaluation=EvaluationOptions(num_images=0),
    )
    whole = plan_from_configs(small, "cpu").memory
    several = plan_from_configs(replace(small, calibration=replace(small.calibration, packages=4)), "cpu").memory
    assert several.host_bytes < whole.host_bytes
    limited = plan_from_configs(replace(small, host_memory=several.host_bytes), "cpu")
    assert limited.options.calibration.streamed and limited.options.calibration.packages is None
    assert len(limited.memory.batches.packages) == 6 and limited.memory.host_bytes <= several.host_bytes
    said = replace(small, host_memory=several.host_bytes, calibration=replace(small.calibration, packages=1))
    with pytest.raises(UserError, match="this prune takes at least"):
        plan_from_configs(said, "cpu")


def test_what_cannot_fit_is_refused_with_what_would(options):
    with pytest.raises(UserError, match=r"at least .* of host memory, while .*; --host_memory is 1\.0 KB\. What would "
                       r"fit: .* or more of it, or a smaller pipeline"):  # fmt: skip
        plan_from_configs(replace(options, host_memory="1KB"), "cpu")


@pytest.mark.slow
def test_a_scan_that_does_not_fit_is_refused_with_another_allocation(options):
    scanned = replace(options, allocation="measured", evaluation=EvaluationOptions(num_images=0))
    needed = plan_from_configs(replace(options, evaluation=EvaluationOptions(num_images=0)), "cpu").memory.host_bytes
    with pytest.raises(UserError, match="What would fit: --allocation uniform"):
        plan_from_configs(replace(scanned, host_memory=needed), "cpu")


@pytest.mark.slow
def test_a_device_has_memory_of_its_own(options):
    planned = plan_from_configs(replace(options, device_memory="40GB"), "cuda")
    assert planned.memory.device is not None and planned.memory.device_bytes > 0
    assert "device memory" in full_plan(planned) and "device memory" in short_plan(planned)
    with pytest.raises(UserError, match=r"of device memory.*--device_memory is 100 MB"):
        plan_from_configs(replace(options, device_memory="100MB"), "cuda")
    with pytest.raises(UserError, match="--device_memory is that of a cuda device, and this run is on the cpu"):
        plan_from_configs(replace(options, device_memory="40GB"), "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "2:4", "method": "wanda"},
        pytest.param({"pattern": "structured:0.3"}, marks=pytest.mark.slow),
        pytest.param({"pattern": "structured:0.3+rank:0.5+2:4"}, marks=pytest.mark.slow),
        {"pattern": "rank:0.5"},
        {"pattern": "depth:1+unstructured:0.5"},
        pytest.param({"pattern": "depth:1", "allocation": None}, marks=pytest.mark.slow),
        pytest.param({"method": "magnitude"}, marks=pytest.mark.slow),
        pytest.param({"method": "taylor"}, marks=pytest.mark.slow),
        pytest.param({"method": "ecodiff", "pattern": "structured:0.5"}, marks=pytest.mark.slow),
        {"allocation": "measured", "scan": ScanOptions(by="backward")},
        pytest.param({"allocation": "measured", "pattern": "structured:0.5"}, marks=pytest.mark.slow),
        {"statistics": "unused-statistics"},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_prune_has_a_plan(options, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan_from_configs(replace(options, **changes), "cpu")
    assert planned.memory.host_bytes > sum(planned.shapes.weights.values())
    text = full_plan(planned)
    assert "host memory:" in text and "time: about" in text
    assert list(tmp_path.iterdir()) == []


def test_a_room_holds_what_is_not_larger():
    memory = type("Plan", (), {"on_host": True, "device_bytes": 0, "host_bytes": 10})()
    assert Room().holds(memory) and Room(host=10).holds(memory) and not Room(host=9).holds(memory)
