"""Training of the pipeline of emoji: its texts are the pipeline's, its stages hand over, and a fit goes on."""

from pathlib import Path

import lightning
import pytest
import torch

import obsdiff
from obsdiff.callbacks.checkpoint import LastCheckpoint
from obsdiff.data.emoji import EmojiWithHeldOut
from obsdiff.embedded.autoencoder import RESULT, AutoencoderTraining, encode, load_autoencoder, psnr_db, whiten
from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, TRAIN_WORDINGS, emoji_prompts, load_emoji
from obsdiff.embedded.pictures import nearest_pictures, save_grid
from obsdiff.embedded.pretrain_emoji import EmojiSD3Pretraining, Learning
from obsdiff.embedded.tiny_sd3 import TinySD3, build_autoencoder, build_tiny_sd3
from obsdiff.errors import UserError
from obsdiff.files import write_json
from obsdiff.models.info import info_of

TINY = TinySD3(
    blocks=2,
    heads=2,
    head_dim=8,
    patch_size=1,
    image_size=32,
    image_channels=3,
    latent_channels=6,
    vae_channels=(8, 8, 8, 8),
    quant_conv=True,
    clip_width=8,
    t5_width=24,
    text_length=10,
    t5_length=12,
    learned_merges=True,
)
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    build_autoencoder(TINY).save_pretrained(folder)
    write_json(folder / RESULT, {})
    return folder


def training(folder, autoencoder, **learning):
    torch.manual_seed(0)
    return EmojiSD3Pretraining(
        str(folder / "out"), str(autoencoder), str(folder / "samples"), TINY, Learning(warmup_steps=1, **learning), CALL
    )


def trainer(folder, steps, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[LastCheckpoint(folder / "checkpoints", every_n_train_steps=2)],
        **options,
    )


def test_every_word_of_every_caption_is_one_token():
    corpus = [*emoji_prompts(TRAIN_WORDINGS), *emoji_prompts(HELD_OUT_WORDINGS)]
    words = sorted({word for prompt in corpus for word in prompt.split()})
    pipe = build_tiny_sd3(TINY, corpus)
    split = [word for word in words if len(pipe.tokenizer.tokenize(word)) != 1]
    assert not [word for word in split if not any(sign.isdigit() for sign in word)]  # CLIP splits these before
    assert not [word for word in words if len(pipe.tokenizer_3.tokenize(word)) != 1]
    assert pipe.tokenizer.tokenize("zyxq") and pipe.tokenizer_3.tokenize("zyxq")
    again = build_tiny_sd3(TINY, corpus)
    assert again.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()


def test_texts_are_encoded_as_the_pipeline_does(tmp_path, autoencoder):
    module = training(tmp_path, autoencoder)
    module.setup("fit")
    names = list(module.tokens)
    prompts = ["", *names[5:4000:500], max(names, key=lambda name: len(name.split()))]
    wanted, _, pooled, _ = module.pipe.encode_prompt(
        prompts, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=12
    )
    clip, t5 = (torch.stack(part) for part in zip(*(module.tokens[prompt] for prompt in prompts), strict=True))
    found = module._embed(clip, t5)
    assert wanted.shape == (len(prompts), 22, 24)
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], pooled)


@pytest.mark.slow
def test_a_fit_goes_on_and_leaves_a_whole_pipeline(tmp_path, autoencoder):
    data = EmojiWithHeldOut(batch_size=4, num_validation=2)
    first = training(tmp_path, autoencoder, muon_lr=1e-3)
    trainer(tmp_path, 2, val_check_interval=2, check_val_every_n_epoch=None).fit(first, data)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000002.png"]
    again = training(tmp_path, autoencoder, muon_lr=1e-3)
    weights_before = {name: value.clone() for name, value in again.state_dict().items()}
    run = trainer(tmp_path, 4, limit_val_batches=0)
    run.fit(again, data, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), weights_only=False)
    assert run.global_step == 4 and int(again.average.n_averaged) == 4 and again.elapsed_s > first.elapsed_s > 0
    moved = [name for name, value in again.state_dict().items() if not torch.equal(value, weights_before[name])]
    assert any("transformer_blocks" in name for name in moved) and any("text_encoder_3" in name for name in moved)

    pipe = obsdiff.load_pipeline(str(tmp_path / "out"))
    assert info_of(pipe).alignment == "emoji" and info_of(pipe).prompts["evaluation"] == "emoji-heldout"
    kept = pipe.transformer.state_dict()
    for name, average in again.average.module["transformer"].state_dict().items():
        assert torch.equal(kept[name].float(), average.half().float()), name
    assert not any(
        torch.equal(kept[n].float(), v) for n, v in first.pipe.transformer.state_dict().items() if "attn" in n
    )
    assert obsdiff.sample(pipe, ["a red apple"], [0]).shape == (1, 3, 32, 32)


def test_time_ends_a_fit_with_a_rate_of_nothing(tmp_path, autoencoder):
    module = training(tmp_path, autoencoder, max_time_s=1e-9)
    run = trainer(tmp_path, 50, limit_val_batches=0)
    run.fit(module, EmojiWithHeldOut(batch_size=4))
    assert run.global_step == 1 and run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_autoencoder_is_asked_for(tmp_path):
    module = training(tmp_path, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no trained autoencoder in .*nothing; make it first with train.py"):
        module.setup("fit")


def test_whitening_keeps_reconstructions_and_makes_latents_plain():
    torch.manual_seed(0)
    vae = build_autoencoder(TINY).eval()
    images = load_emoji().images()[:300]
    with torch.no_grad():
        before = vae.decode(encode(vae, images)).sample
        whiten(vae, images)
        latents = encode(vae, images)
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
        drawn = vae.encode(images[:4]).latent_dist.sample()
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    covariance = flat.T.cov()
    torch.testing.assert_close(flat.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance - covariance.diag().diag(), torch.zeros(6, 6), atol=1e-3, rtol=0)
    assert covariance.diag().max() < 1.001
    torch.testing.assert_close(drawn, latents[:4], atol=0.02, rtol=0)  # exp(-6) is 0.0025


@pytest.mark.slow
def test_an_autoencoder_is_trained_and_its_decoder_refined(tmp_path):
    torch.manual_seed(0)
    data = EmojiWithHeldOut(batch_size=4, num_validation=4)
    trainer(tmp_path, 2, limit_val_batches=0).fit(AutoencoderTraining(str(tmp_path / "ae"), TINY), data)
    module = AutoencoderTraining(str(tmp_path / "refined"), TINY, refine=str(tmp_path / "ae"), latent_noise=0.1)
    trainer(tmp_path / "second", 2, limit_val_batches=0).fit(module, data)
    one, two = (load_autoencoder(str(tmp_path / name)) for name in ("ae", "refined"))
    images = load_emoji().images()[:3]
    torch.testing.assert_close(encode(one, images), encode(two, images), atol=1e-5, rtol=1e-5)
    assert not torch.equal(one.decoder.conv_in.weight, two.decoder.conv_in.weight)


def test_noise_ratio_by_hand():
    assert psnr_db(4.0) == 0 and psnr_db(0.04) == pytest.approx(20)


def test_nearest_pictures_and_grids(tmp_path):
    atlas = load_emoji().images()[:50]
    found = nearest_pictures(atlas[[7, 3]] + 0.01, atlas, 3)
    assert found[:, 0].tolist() == [7, 3] and found.shape == (2, 3)
    assert found[0].tolist() == ((atlas - atlas[7] - 0.01).square().sum((1, 2, 3))).argsort()[:3].tolist()
    save_grid([atlas[:3], atlas[3:6]], tmp_path / "new" / "grid.png")
    assert [path.name for path in Path(tmp_path / "new").iterdir()] == ["grid.png"]
