"""Training the small autoencoder of the embedded pipeline ``emoji-sd3``, the first of its two stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from obsdiff.embedded.tiny_sd3 import TinySD3, build_autoencoder
from obsdiff.errors import UserError
from obsdiff.files import check_folder, check_writable, whole_folder, write_json

RESULT = "result.json"
LOG_VARIANCE = -12.0  # of the latents' posterior: it is not trained, so a sample is as good as the mode
LEAST_SPREAD = 0.5  # of the median spread; quieter directions are not blown up to unit variance


class AutoencoderTraining(lightning.LightningModule):
    """Trains an ``AutoencoderKL`` to reproduce images from the modes of its latents, then whitens them.

    Or refines the decoder of a trained one, whose latents stay what they are, under noise on them as samplers leave it.

    Args:
        output: Folder that receives the autoencoder and ``result.json`` (written whole, at the end of the fit).
        sizes: Of the pipeline that it is made for, with ``quant_conv``.
        lr: Peak learning rate (AdamW, linear warm-up of 100 steps, cosine to zero).
        refine: Folder of the trained autoencoder whose decoder is to be refined; None trains one from scratch.
        latent_noise: Standard deviation of the noise on the latents while refining.
    """

    def __init__(
        self, output: str, sizes: TinySD3, lr: float = 3e-3, refine: str | None = None, latent_noise: float = 0.0
    ) -> None:
        super().__init__()
        if not sizes.quant_conv:
            raise UserError("the latents are whitened through the layers of quant_conv; set sizes.quant_conv to true")
        self.output, self.lr, self.refine, self.latent_noise = output, lr, refine, latent_noise
        self.vae = build_autoencoder(sizes).to(memory_format=torch.channels_last)
        if refine is not None:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before the training."""
        check_folder(Path(self.output), RESULT, "a trained autoencoder", replace=True)
        check_writable(Path(self.output))
        if self.refine is not None:
            self.vae.load_state_dict(load_autoencoder(self.refine).state_dict())

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / total))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(images).latent_dist.mode()
        if self.refine is not None:
            latents = latents + self.latent_noise * torch.randn_like(latents)
        decoded = self.vae.decode(latents).sample
        loss: Tensor = (decoded - images).square().mean()
        self.log("loss/autoencoder", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/mse", squared_error(self.vae, batch["image"]))

    def on_validation_epoch_end(self) -> None:
        self.log("val/psnr_db", psnr_db(float(self.trainer.callback_metrics["val/mse"])))

    def on_train_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        images = self.trainer.datamodule.images()  # type: ignore[attr-defined]  # given to the trainer
        vae = self.vae.eval().float()
        before = psnr_db(mean_squared_error(vae, images))
        if self.refine is None:
            whiten(vae, images)
        after = psnr_db(mean_squared_error(vae, images))
        with whole_folder(Path(self.output), RESULT, replace=True) as folder:
            vae.save_pretrained(folder)
            write_json(folder / RESULT, {"psnr_db": after, "psnr_db_before_whitening": before, "images": len(images)})


def load_autoencoder(folder: str) -> Any:
    """The ``AutoencoderKL`` that a fit of :class:`AutoencoderTraining` left in ``folder``, in eval mode.

    Raises:
        UserError: There is none.
    """
    from diffusers import AutoencoderKL

    if not (Path(folder) / RESULT).is_file():
        raise UserError(
            f"no trained autoencoder in {folder}; make it first with train.py fit --config "
            "configs/pretrain/emoji_autoencoder.yaml"
        )
    return AutoencoderKL.from_pretrained(folder).eval()


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch_size: int = 128) -> Tensor:
    """The modes of the latents (n, c, h, w) of images (n, 3, height, width) in [-1, 1]."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(batch_size)])


@torch.no_grad()
def squared_error(vae: Any, images: Tensor) -> Tensor:
    """Mean squared error of images (n, 3, height, width) after encoding and decoding, clamped to [-1, 1]."""
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error: Tensor = (decoded - images).square().mean()
    return error


def mean_squared_error(vae: Any, images: Tensor, batch_size: int = 128) -> float:
    """The same over any number of images."""
    parts = images.split(batch_size)
    return sum(float(squared_error(vae, part)) * len(part) for part in parts) / len(images)


@torch.no_grad()
def whiten(vae: Any, images: Tensor) -> None:
    """Rotate and scale the latents of ``vae`` so that their channels are uncorrelated and of like size, in place.

    Principal components over all images and places; the pointwise layers beside the latents take up the map and its
    inverse, so that reconstructions stay what they are. Latents then need no shift and no scaling factor.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    latents = encode(vae, images).double().permute(0, 2, 3, 1).flatten(0, 2)
    mean = latents.mean(0)
    eigenvalues, vectors = torch.linalg.eigh((latents - mean).T @ (latents - mean) / len(latents))
    spread = eigenvalues.clamp_min(0).sqrt()
    spread = spread.clamp_min(LEAST_SPREAD * float(spread.median()))
    forward, backward = vectors.T / spread[:, None], vectors * spread
    channels = len(mean)
    weight, bias = quant.weight.double().flatten(1), quant.bias.double()
    new_weight, new_bias = torch.zeros_like(weight), torch.full_like(bias, LOG_VARIANCE)
    new_weight[:channels] = forward @ weight[:channels]
    new_bias[:channels] = forward @ (bias[:channels] - mean)
    quant.weight.copy_(new_weight.view_as(quant.weight))
    quant.bias.copy_(new_bias)
    weight = post.weight.double().flatten(1)
    post.bias.copy_(post.bias.double() + weight @ mean)
    post.weight.copy_((weight @ backward).view_as(post.weight))
