"""Every family recorded, replayed and recovered: from prompts, through its own text encoders, from a saved folder."""

import json
from pathlib import Path

import lightning
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_tensor

import obsdiff
from obsdiff.callbacks.checkpoint import LastCheckpoint
from obsdiff.callbacks.export import Export
from obsdiff.cli.main import main
from obsdiff.data.trajectories import TrajectoryDataModule, TrajectoryDataset
from obsdiff.errors import UserError
from obsdiff.evaluation.sampling import FRAMES, sample
from obsdiff.models.calling import call_denoiser, drop_prompts
from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.families import find_family
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, write_info
from obsdiff.models.loading import absent
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions
from obsdiff.pruning.record import open_trajectories, record_trajectories
from obsdiff.training.options import Objective, Optimization
from obsdiff.training.recovery import Recovery
from tests.families.pipelines import PIPELINES, PROMPTS, each

# an image-to-video pipeline is told of an image too, which a list of prompts does not hold
WITH_PROMPTS = [name for name in PIPELINES if name != "wan21-i2v"]
NO_GUIDANCE = {"qwen-image"}  # its guidance asks for a negative prompt


def prompts_of(row):
    """What the pipeline is asked for: texts, classes or nothing."""
    if row.text == "class_labels":
        return ["0", "5", "2"]
    return list(PROMPTS[:3]) if row.text else [""] * 3


def save(name, folder):
    """The tiny pipeline as a folder of diffusers with obsdiff's information."""
    row = PIPELINES[name]
    row.build().save_pretrained(folder)
    call = {key: value for key, value in row.call.items() if key in CALL_ARGUMENTS and value is not None}
    write_info(PipelineInfo(name, call), folder)
    return folder


@pytest.fixture(scope="module", params=each(WITH_PROMPTS))
def saved(request, tmp_path_factory):
    """Name and folder of one family's pipeline."""
    return request.param, save(request.param, tmp_path_factory.mktemp("saved") / request.param)


class Heard:
    """What the pipeline's denoisers answered while it was recorded: by call, the latents and the answers."""

    def __init__(self, row, pipe):
        self.row, self.answers, self.models = row, [], []
        self.handles = [m.register_forward_hook(self.hear, with_kwargs=True) for m in denoisers_of(pipe).values()]

    def hear(self, model, args, given, answer):
        self.models.append(model)
        answer = answer[0] if isinstance(answer, tuple) else answer.sample
        self.answers.append(torch.stack(answer) if isinstance(answer, list) else answer)

    def split(self, batches, guided):
        """Answers (prompts, calls, ...) to the prompts themselves, and to the negative ones."""
        for handle in self.handles:
            handle.remove()
        each = len(self.answers) // len(batches)
        own, negative = [], []
        for number, size in enumerate(batches):
            calls = self.answers[number * each : (number + 1) * each]
            if guided and self.row.guidance == "two calls":
                own.append(torch.stack(calls[::2], dim=1))
                negative.append(torch.stack(calls[1::2], dim=1))
                continue
            halves = [(x[:size], x[-size:]) for x in calls]
            last = self.row.guidance == "negative first"
            own.append(torch.stack([pair[last] for pair in halves], dim=1))
            negative.append(torch.stack([pair[not last] for pair in halves], dim=1))
        return torch.cat(own), torch.cat(negative)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_replay_answers_what_the_pipeline_heard(saved, tmp_path):
    """Rows, order, arguments, masks, times: of the prompts, and of the negative ones that dropped prompts become."""
    name, folder = saved
    row = PIPELINES[name]
    pipe = obsdiff.load_pipeline(folder)
    _ = subject_of(pipe).call  # remembered, so that only what is recorded is heard
    heard = Heard(row, pipe)
    record_trajectories(pipe, prompts_of(row), tmp_path / "recording", batch_size=2)
    guided = row.guidance not in ("none", "embedded") and name not in NO_GUIDANCE
    own, negative = heard.split([2, 1], guided)
    recording = open_trajectories(tmp_path / "recording")
    assert recording.latents.shape[:2] == own.shape[:2]
    assert torch.equal(recording.answers, own)
    assert torch.equal(recording.negative_answers, negative) if guided else recording.negative_answers is None
    family = find_family(*denoisers_of(pipe).values())
    assert (family.sign < 0) is (row.output == "negated")
    assert family.learned_sigma is (row.output == "first half of the channels")
    if row.output != "trigonometric":
        told = recording.times if recording.times.dim() == 1 else recording.times[:, 0]
        close(told, family.time_offset + family.time_scale * pipe.scheduler.timesteps.float())
    batch = default_collate(list(TrajectoryDataset(recording)))
    denoiser = subject_of(pipe).denoiser

    def replay(dropped):
        embeds = drop_prompts(batch["embeds"], torch.full((len(batch["latents"]),), dropped))
        with torch.no_grad():
            answer = call_denoiser(denoiser, batch["latents"], batch["time"], embeds, recording.common)
        return answer.unflatten(0, own.shape[:2])

    close(replay(False), own)
    if guided:
        close(replay(True), negative)
        assert not torch.allclose(own, negative, rtol=1e-3)


def test_prompts_are_encoded_once(saved, tmp_path):
    """A second pass over the same prompts runs no text encoder, and sees the same."""
    name, folder = saved
    row, pipe = PIPELINES[name], obsdiff.load_pipeline(folder)
    encoders = [m for part, m in pipe.components.items() if part.startswith("text_encoder")]
    assert bool(encoders) is row.prompts
    record_trajectories(pipe, prompts_of(row), tmp_path / "first", batch_size=2)
    ran = []
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    record_trajectories(pipe, prompts_of(row), tmp_path / "second", batch_size=2)
    assert len(ran) <= (6 if find_family(*denoisers_of(pipe).values()).encoded else 0)  # SD3: once over all prompts
    first, second = (open_trajectories(tmp_path / which) for which in ("first", "second"))
    assert torch.equal(first.latents, second.latents) and first.embeds.keys() == second.embeds.keys()
    assert all(torch.equal(first.embeds[key], second.embeds[key]) for key in first.embeds)


def test_sampling(saved, tmp_path):
    """Images in [0, 1] of every pipeline, each of its own seed and prompt alone; through the command line too."""
    name, folder = saved
    row = PIPELINES[name]
    pipe, prompts = obsdiff.load_pipeline(folder), prompts_of(row)
    images = sample(pipe, prompts, [3, 4, 3], batch_size=3)
    alone = sample(pipe, prompts[1:2], [4])
    frames = min(FRAMES, row.call.get("num_frames", 1))
    side = row.call.get("height", 8 if row.sample == "sample" else 16)
    assert images.shape == (3, 3, side, side * frames) and images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    torch.testing.assert_close(alone[0], images[1], rtol=0, atol=1e-3)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    asked = ["--prompt", f"[{prompts[1]!r}]"] if row.text else ["--num_images", "1"]
    main(["sample", str(folder), *asked, "--seed", "4", "--output", str(tmp_path / "one.png"), "--device", "cpu"])
    drawn = to_tensor(Image.open(tmp_path / "one.png"))
    torch.testing.assert_close(drawn, alone[0], rtol=0, atol=2 / 255)


def fit(name, folder, tmp_path, pattern):
    """Two optimizer steps by distillation on recorded trajectories, as a user's own trainer runs them; the module."""
    asked = None
    if PIPELINES[name].text:
        asked = str(tmp_path / "prompts.txt")
        Path(asked).write_text("\n".join(prompts_of(PIPELINES[name])))
    module = Recovery(
        str(folder),
        str(tmp_path / "run"),
        PruningOptions(
            pattern=pattern,
            allocation="uniform",
            spare_blocks=[],
            calibration=CalibrationOptions(prompts=asked, num_prompts=2, batch_size=2),
        ),
        objective=Objective(distill_output=1.0, distill_features=0.1),
        optimization=Optimization(lr=1e-3, weight_decay=0.1, warmup_steps=0),
        evaluation=EvaluationOptions(num_images=2, prompts=asked),
        prompt_dropout=0.5,
    )
    data = TrajectoryDataModule(str(folder), str(tmp_path / "recording"), asked, num_prompts=3, batch_size=3)
    runner = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        callbacks=[Export(), LastCheckpoint(dirpath=str(tmp_path / "run" / "checkpoints"))],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    runner.fit(module, datamodule=data)
    return module


PATTERNS = ("unstructured:0.5", "structured:0.4")
USUAL = {  # the others take minutes together
    *((name, PATTERNS[0]) for name in ("qwen-image", "ddpm")),
    *((name, PATTERNS[1]) for name in ("flux", "wan22")),
}
RECOVERED = [
    pytest.param(name, pattern, marks=() if (name, pattern) in USUAL else pytest.mark.slow)
    for name in WITH_PROMPTS
    for pattern in PATTERNS
]


@pytest.mark.parametrize(("saved", "pattern"), RECOVERED, indirect=["saved"])
def test_two_steps_of_distillation(saved, tmp_path, pattern):
    """Masks hold, each denoiser learns, the teacher stays out of the checkpoint, the result is plain diffusers'."""
    name, folder = saved
    row = PIPELINES[name]
    module = fit(name, folder, tmp_path, pattern)
    result = tmp_path / "run" / "recovered"
    before, after = (obsdiff.load_pipeline(tmp_path / "run" / run) for run in ("pruned", "recovered"))
    for component, model in denoisers_of(after).items():
        old = dict(denoisers_of(before)[component].named_parameters())
        changed = [key for key, p in model.named_parameters() if not torch.equal(p, old[key])]
        assert len(changed) > len(old) // 2
    masks = module.named_masks()
    assert bool(masks) is pattern.startswith("unstructured")
    trained = dict(subject_of(after).denoiser.named_parameters())
    assert all(bool((trained[key][~kept] == 0).all()) for key, kept in masks.items())
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert set(checkpoint["state_dict"]) == {f"denoiser.{key}" for key in module.denoiser.state_dict()}
    report = json.loads((result / "report.json").read_text())
    assert report["flops"]["pruned"] <= report["flops"]["dense"] and report["flops"]["dense"] > 0
    assert report["evaluation"]["recovered"]["mse"] > 0
    assert module.batch_flops > 3 * report["flops"]["pruned"]
    plain = DiffusionPipeline.from_pretrained(
        result / "pipeline", **absent(result / "pipeline"), trust_remote_code=True
    )
    plain.set_progress_bar_config(disable=True)
    given = row.conditioning(1)
    assert torch.equal(row.sample_rows(plain, given, [0]), row.sample_rows(after, given, [0]))


def test_a_pipeline_that_needs_an_image_says_what_to_give(tmp_path):
    pipe = PIPELINES["wan21-i2v"].build()
    with pytest.raises(UserError, match=r"WanImageToVideoPipeline is told an image .* as a Conditioning"):
        record_trajectories(pipe, ["a cat"], tmp_path / "recording")
    assert not list(tmp_path.iterdir())
