"""What a recovery takes of memory: a step on the meta device against a real one, and the arithmetic around it."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from obsdiff.allocation.fitting import Room
from obsdiff.cli.train import main
from obsdiff.errors import UserError
from obsdiff.models.subject import subject_of
from obsdiff.models.weightless import open_weightless
from obsdiff.peaks import Moment, Peaks, host_parts
from obsdiff.training.memory_plan import Sizes, moments_of
from obsdiff.training.options import Optimization, Trained
from obsdiff.training.planning import RecoveryPlan, _encoding, check_room
from obsdiff.training.selection import choose_trained
from obsdiff.training.step_memory import step_memory, told_to
from tests.families.pipelines import PIPELINES
from tests.models.test_weightless import FAMILIES, emptied
from tests.training.common import arguments, fit

ALL, ADAMW = Trained(), Optimization()


def filled(told):
    """The same batch on the CPU."""

    def real(value):
        return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value

    embeds, common = (tree_map_only(torch.Tensor, real, dict(part)) for part in (told.embeds, told.common))
    return replace(told, latents=real(told.latents), times=real(told.times), embeds=embeds, common=common)


def counted(subject, told, *, weights=None, trained=ALL, teachers=(), optimization=ADAMW):
    models = list(subject.components.values())
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in linears(subject.denoiser)}
    choose_trained(subject.denoiser, masks if trained.lora_rank else {}, trained)
    return step_memory(models, list(teachers), weights or {"distill_output": 1.0}, told, optimization)


def linears(denoiser):
    return [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)][:4]


def both(pipe_folder, **asked):
    """The same step without weights and with them."""
    from obsdiff.pruning.folder import load_pipeline

    found = []
    teaching = asked.pop("teaching", False)
    for make in (lambda: open_weightless(str(pipe_folder)), lambda: load_pipeline(str(pipe_folder))):
        subject, dense = subject_of(make()), subject_of(make())
        told = told_to(subject, 8, "distill_guided" in (asked.get("weights") or {}), None)
        real = next(subject.denoiser.parameters()).device.type == "cpu"
        teachers = [dense.denoiser.requires_grad_(False)] if teaching else []
        found.append(counted(subject, filled(told) if real else told, teachers=teachers, **asked))
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {},
        pytest.param({"weights": {"denoise": 1.0}}, marks=pytest.mark.slow),
        {"weights": {"distill_guided": 1.0}},
        {"weights": {"distill_output": 1.0, "distill_features": 1.0}, "teaching": True},
        {"trained": Trained(lora_rank=2)},
        {"trained": Trained(gradient_checkpointing=True)},
        pytest.param({"optimization": Optimization(optimizer="torch.optim.SGD")}, marks=pytest.mark.slow),
    ],
    ids=lambda asked: "-".join(asked) or "plain",
)
def test_a_step_without_weights_makes_what_one_with_weights_makes(pipe_folder, asked):
    meta, real = both(pipe_folder, **asked)
    assert meta.peak == pytest.approx(real.peak, rel=0.05)
    assert meta.kept == pytest.approx(real.kept, rel=0.01, abs=256)


@pytest.mark.slow
def test_fused_kernels_make_nothing_beside_moments(pipe_folder):
    fused, plain = (both(pipe_folder, optimization=Optimization(arguments={"fused": on}))[0] for on in (True, False))
    assert fused.kept == plain.kept and fused.peak <= plain.peak


def test_images_are_encoded_by_the_autoencoder(pipe_folder):
    subject = subject_of(open_weightless(str(pipe_folder)))
    peak, shape = _encoding(subject, 8, (1, 16, 16))
    assert shape == (4, 8, 8) and peak > 8 * 4 * 16 * 16


def test_adam_keeps_two_moments_and_sgd_none(pipe_folder):
    weights = sum(p.nbytes for p in open_weightless(str(pipe_folder)).transformer.parameters())
    adam, _ = both(pipe_folder)
    sgd, _ = both(pipe_folder, optimization=Optimization(optimizer="torch.optim.SGD"))
    assert adam.kept == pytest.approx(2 * weights, rel=0.01) and adam.peak > 3 * weights
    assert sgd.kept == 0 and sgd.peak > weights
    assert adam.gradients == sgd.gradients == weights


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_step_without_weights(name, tmp_path):
    if name in ("lumina2", "wan21-i2v"):
        pytest.skip("it is not planned without weights")
    pipe = emptied(PIPELINES[name], tmp_path / "p")
    meta, real = subject_of(open_weightless(str(tmp_path / "p"))), subject_of(pipe)
    told = told_to(meta, 2, False, None)
    assert counted(meta, told).peak == pytest.approx(counted(real, filled(told)).peak, rel=0.1)


SIZES = Sizes(
    process=1_000_000, whole=700, dense=500, others=200, student=400, training=450, teacher=300, masked=100,
    converted=300, anew=350, average=50, step=3_000, moments=900, gradients=450, encoding=80, recording=60, images=40,
    drawing=70, recorded=30, shard=20,
)  # fmt: skip


def at(moments, name):
    (found,) = [moment for moment in moments if moment.name == name]
    return found


def test_each_moment_holds_what_is_there_then():
    before = Moment("solving x", {"weights": 700}, {"process": 1_000_000})
    found = list(moments_of(SIZES, [before], released=True, on_host=False))
    assert sum(at(found, "recording").device.values()) == 700 + 30
    assert at(found, "recording").host == {"process": 1_000_000, "recording": 2 * 20}
    assert at(found, "solving x").host == {"process": 1_000_000, "recording": 60}
    assert sum(at(found, "opening both pipelines").device.values()) == 500 + 400 + 200
    assert sum(at(found, "training").device.values()) == 450 + 300 + 5 * 100 + 50 + 3_000
    assert sum(at(found, "training").host.values()) == 1_000_000 + 60 + 100 + 40
    assert sum(at(found, "writing a checkpoint").device.values()) == 450 + 300 + 5 * 100 + 50 + 900 + 450
    assert sum(at(found, "validating").device.values()) == 450 + 300 + 5 * 100 + 50 + 900 + 450 + 70 + 200
    assert sum(at(found, "writing the result").host.values()) == 1_000_000 + 60 + 100 + 40 + 450 + 300 + 400


def test_a_result_is_opened_then_written():
    """While it is opened its file counts beside what is converted; when it is written, parts that had left."""

    def written(released, **sizes):
        found = at(moments_of(replace(SIZES, **sizes), [], released, on_host=True), "writing the result")
        return found.host["written pipeline"]

    assert written(True, converted=0, anew=0) == 400  # all shared
    assert written(True, converted=0, anew=350) == 350 + 200  # merged after the file is closed
    assert written(True, converted=400, anew=400) == 400 + 400
    assert written(False, converted=0, anew=0) == 400 + 200


def test_on_the_host_all_lies_in_one_memory():
    found = list(moments_of(SIZES, [], released=False, on_host=True))
    training = sum(host_parts(at(found, "training"), True).values())
    assert training == 1_000_000 + 60 + 100 + 40 + 450 + 300 + 4 * 100 + 50 + 200 + 3_000
    small = replace(SIZES, step=10, moments=4, gradients=3, encoding=80, recorded=0, drawing=0)
    found = list(moments_of(small, [], released=False, on_host=True))
    assert at(found, "training").device["step"] == 87
    assert [m.name for m in found] == [
        "opening both pipelines",
        "training",
        "writing a checkpoint",
        "writing the result",
    ]


def test_what_does_not_fit_is_refused_with_what_takes_less():
    peaks = Peaks(moments=tuple(moments_of(SIZES, [], released=True, on_host=True)), on_host=True)
    plan = RecoveryPlan(peaks, 10, 10, {}, None, ())
    check_room(plan, Room(host=peaks.host_bytes))
    with pytest.raises(
        UserError, match=r"takes 1\.0 MB of host memory, while training; --host_memory is 1\.0 MB.*lora"
    ):
        check_room(plan, Room(host=peaks.host_bytes - 1))


# ---- the command


@pytest.mark.parametrize("images", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dry_run_plans_and_leaves_nothing(pipe_folder, tmp_path, capfd, images):
    fit(pipe_folder, tmp_path / "out", "--dry_run=true", images=images, folder=tmp_path / "trajectories")
    said = capfd.readouterr().out
    assert "in batches of 4, planned without weights" in said and "host memory: " in said
    assert "while training" in said and "one step" in said
    assert ("recording " in said) is not images
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plan_goes_by_what_was_pruned_before(pipe_folder, tmp_path, capfd):
    fit(pipe_folder, tmp_path / "out", pattern="structured:0.5", steps=1)
    capfd.readouterr()
    fit(pipe_folder, tmp_path / "out", "--dry_run=true", pattern="structured:0.5")
    said = capfd.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("trained: ")]
    assert " of " in line and "solving" not in said and "counted as if" not in said
    fit(pipe_folder, tmp_path / "other", "--dry_run=true", pattern="structured:0.5")
    said = capfd.readouterr().out
    assert "solving" in said and "counted as if it trained" in said


def planned(capfd, *args, **options):
    """What a dry run says, or the one line that refuses it."""
    capfd.readouterr()
    try:
        fit(*args, "--dry_run=true", **options)
    except SystemExit:
        return capfd.readouterr().err.splitlines()[-1]
    return capfd.readouterr().out


@pytest.mark.slow
def test_another_prune_in_the_output_is_refused_or_replaced(pipe_folder, tmp_path, capfd):
    out = tmp_path / "out"
    fit(pipe_folder, out, steps=1)
    assert "solving" not in planned(capfd, pipe_folder, out)
    assert "was pruned with other settings" in planned(capfd, pipe_folder, out, pattern="2:4")
    assert "solving" in planned(capfd, pipe_folder, out, "--model.overwrite=true", pattern="2:4")
    assert "is pruned already" in planned(capfd, out / "pruned", tmp_path / "more")


@pytest.mark.slow
def test_stages_that_went_are_no_stages_to_learn_from(pipe_folder, tmp_path, capfd):
    features = ("--model.objective.distill_features=1", "--model.pruning.scan.triples=4")
    fit(pipe_folder, tmp_path / "out", *features, pattern="depth:1", steps=1)
    said = planned(capfd, pipe_folder, tmp_path / "out", *features, pattern="depth:1")
    assert "recovery by distill_features" in said and "host memory" in said


@pytest.mark.slow
def test_masks_of_what_is_left_of_layers_are_counted(pipe_folder, tmp_path, capfd):
    lora, pattern = "--model.trained.lora_rank=2", "structured:0.5+2:4"
    before = planned(capfd, pipe_folder, tmp_path / "out", lora, pattern=pattern)
    fit(pipe_folder, tmp_path / "out", lora, pattern=pattern, steps=1)
    after = planned(capfd, pipe_folder, tmp_path / "out", lora, pattern=pattern)
    trained = [int(re.search(r"trained: ([\d,]+)", said)[1].replace(",", "")) for said in (before, after)]
    assert 0 < trained[1] < trained[0]  # the same layers, some of them smaller now


@pytest.mark.slow
def test_a_pipeline_with_another_denoiser_is_planned(pipe_folder, tmp_path, capfd):
    (file,) = (pipe_folder / "transformer").glob("*.safetensors")
    assert "host memory" in planned(capfd, f"{pipe_folder} with {file}", tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.trained.include=[nothing]"], "matches no parameter"),
        (["--data=obsdiff.data.emoji.EmojiDataModule"], "has images of 3 channels"),
    ],
)
def test_a_plan_refuses_what_a_fit_refuses(pipe_folder, tmp_path, capfd, more, message):
    assert message in planned(capfd, pipe_folder, tmp_path / "out", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--host_memory=100MB"], r"this recovery takes .* of host memory, while .*; --host_memory is 100 MB"),
        (["--device_memory=1GB"], "--device_memory is that of a cuda device"),
        (["--host_memory=much"], "host_memory is 'much'"),
    ],
)
def test_a_fit_that_cannot_be_is_refused_before_anything_is_done(pipe_folder, tmp_path, capfd, more, message):
    with pytest.raises(SystemExit) as ended:
        fit(pipe_folder, tmp_path / "out", *more)
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_a_plan_is_of_a_fit(pipe_folder, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(["validate", *arguments(pipe_folder, tmp_path / "out", "--dry_run=true")])
    assert "plan a fit; leave them out of validate" in capfd.readouterr().err
