"""The embedded pipeline without prompts: its size, what it draws, how it is made and measured."""

from pathlib import Path

import lightning
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

import obsdiff
from obsdiff.cli.main import main
from obsdiff.data.digits import DigitsWithHeldOut
from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.classifier import load_classifier
from obsdiff.embedded.pretrain_ddpm import DigitsDDPMPretraining
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS, check_measurable
from obsdiff.evaluation.evaluate import evaluation_of
from obsdiff.evaluation.references import draw
from obsdiff.evaluation.suite import load_suite
from obsdiff.export.figures import named
from obsdiff.models.info import PipelineInfo, attach_info, call_arguments, info_of
from obsdiff.pruning.options import EvaluationOptions

ASSET = Path(__file__).parents[2] / "data" / "assets" / "digits-ddpm"
TINY = TinyDDPM(channels=(8, 16), groups=4, head_dim=8)


@pytest.fixture(scope="module")
def pipe():
    return obsdiff.load_pipeline("digits-ddpm")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    made = build_tiny_ddpm(TINY)
    made.set_progress_bar_config(disable=True)
    attach_info(made, PipelineInfo("tiny", {"num_inference_steps": 2}, "digits"))
    return made


def test_it_is_small_and_genuine(pipe):
    assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in ASSET.rglob("*") if path.is_file()) <= 4 * 2**20
    assert all(bool(torch.isfinite(parameter).all()) for parameter in pipe.unet.parameters())


def test_it_has_attention_of_several_heads_everywhere_and_many_groups(pipe):
    attention = {name: module for name, module in pipe.unet.named_modules() if type(module).__name__ == "Attention"}
    assert {name.split(".")[0] for name in attention} == {"down_blocks", "mid_block", "up_blocks"}
    assert all(module.heads > 1 for module in attention.values())
    norms = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {16} and min(norm.num_channels for norm in norms) == 32


@pytest.mark.slow
def test_its_images_look_like_digits(pipe):
    images = obsdiff.sample(pipe, [""] * 200, range(200), batch_size=100)
    reader = READERS["digits"]
    assert images.shape == (200, 1, 16, 16)
    assert set(reader.read(images).tolist()) == set(range(10))
    sure = load_classifier()(images * 2 - 1).softmax(1).amax(1)
    assert float(sure.mean()) > 0.85  # noise: 0.34; held-out scans: 0.94
    distance = frechet_distance(reader.features(images), reader.real())
    assert distance is not None and distance < 10  # noise: 66; the training scans: 2.5


def test_its_images_depend_on_their_own_seeds_only(tiny):
    together = obsdiff.sample(tiny, [""] * 3, [4, 5, 6], batch_size=3)
    alone = obsdiff.sample(tiny, [""], [5])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_refused(tiny):
    with pytest.raises(UserError, match="tiny draws without prompts; leave 'a seven' out"):
        obsdiff.sample(tiny, ["", "a seven"], [0, 1])
    with pytest.raises(UserError, match="takes no guidance_scale"):
        obsdiff.sample(tiny, [""], [0], call={"guidance_scale": 2.0})


def test_it_is_measured_without_alignment(tiny):
    prompts, seeds = [""] * 4, [0, 1, 2, 3]
    check_measurable(prompts, "digits")
    dense = draw(tiny, prompts, seeds, 4, "digits")
    assert len(dense.guided) == 4 and not len(dense.unguided)
    found = evaluation_of(load_suite("digits", EvaluationOptions()), prompts, seeds, {"dense": dense, "pruned": dense})
    assert set(named(found["pruned"])) == {"mse", "psnr", "ssim", "frechet", "kid", "precision", "recall"}
    assert found["pruned"]["mse"] == 0 and found["pruned"]["frechet"] == found["dense"]["frechet"] > 0


def test_its_pretraining_makes_a_pipeline_of_averaged_weights(tmp_path):
    torch.manual_seed(0)
    call = {"num_inference_steps": 3}
    module = DigitsDDPMPretraining(str(tmp_path / "made"), warmup_steps=1, ema_decay=0.5, call=call, sizes=TINY)
    start = {name: parameter.clone() for name, parameter in module.denoiser.named_parameters()}
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({name: p.detach().clone() for name, p in pl_module.denoiser.named_parameters()})

    trainer = lightning.Trainer(accelerator="cpu", max_steps=3, limit_val_batches=1, val_check_interval=1,
                                logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, callbacks=[Watch()])  # fmt: skip
    trainer.fit(module, datamodule=DigitsWithHeldOut(batch_size=8))
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    pipe = obsdiff.load_pipeline(tmp_path / "made")
    name = "conv_in.weight"
    average = 0.25 * seen[0][name] + 0.25 * seen[1][name] + 0.5 * seen[2][name]
    stored = dict(pipe.unet.named_parameters())[name]
    torch.testing.assert_close(stored, average.half().float())
    assert not torch.equal(stored, start[name].half().float())
    assert pipe.unet.config.dropout == 0 and info_of(pipe).alignment == "digits"
    assert call_arguments(pipe) == call
    assert bool(torch.isfinite(obsdiff.sample(pipe, [""], [0])).all())


def test_the_command_draws_without_a_prompt(capsys, tmp_path):
    main(["sample", "digits-ddpm", "--num_images", "2", "--steps", "2", "--output", str(tmp_path / "two")])
    assert [Image.open(file).size for file in sorted((tmp_path / "two").iterdir())] == [(16, 16)] * 2
    for wrong, message in (
        (["--num_images", "0"], "num_images is 0"),
        (["--num_images", "2", "--prompt", "a two"], "not both"),
        (["--prompt", "a two", "--output", str(tmp_path / "a.png")], "draws without prompts"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["sample", "digits-ddpm", *wrong])
        assert left.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
