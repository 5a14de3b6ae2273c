"""Training the embedded pipeline ``digits-sd3`` from scratch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from obsdiff.diffusion import flow
from obsdiff.embedded.digits import HELD_OUT_WORDINGS, TRAIN_WORDINGS, digit_prompts
from obsdiff.embedded.tiny_sd3 import TinySD3, build_tiny_sd3
from obsdiff.files import check_folder, check_writable, whole_folder, write_json
from obsdiff.models.info import INFO_FILE, PipelineInfo

PROMPTS = {"calibration": "digits-train", "evaluation": "digits-heldout"}


class DigitsSD3Pretraining(lightning.LightningModule):
    """Trains a tiny Stable Diffusion 3 pipeline: first the autoencoder, then transformer and text encoders together.

    Args:
        output: Folder that receives the finished pipeline (written whole, at the end of the fit).
        autoencoder_steps: Optimizer steps of the first phase; the rest of the trainer's ``max_steps`` is the second.
        autoencoder_lr: Peak learning rate of the first phase (AdamW, cosine to zero).
        lr: Peak learning rate of the second phase.
        warmup_steps: Linear warm-up of the second phase.
        prompt_dropout: Share of prompts replaced by the empty one, for classifier-free guidance.
        kl_weight: Weight of the autoencoder's Kullback-Leibler term.
        call: The pipeline's own call defaults, stored beside it.
        sizes: Widths and depths of the pipeline.
    """

    def __init__(
        self,
        output: str,
        autoencoder_steps: int = 1500,
        autoencoder_lr: float = 2e-3,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        prompt_dropout: float = 0.1,
        kl_weight: float = 1e-6,
        call: dict[str, int | float] | None = None,
        sizes: TinySD3 | None = None,
    ) -> None:
        super().__init__()
        self.output = output
        self.autoencoder_steps = autoencoder_steps
        self.autoencoder_lr = autoencoder_lr
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.prompt_dropout = prompt_dropout
        self.kl_weight = kl_weight
        self.call = call or {}
        self.sizes = sizes or TinySD3()
        corpus = digit_prompts(TRAIN_WORDINGS) + digit_prompts(HELD_OUT_WORDINGS)
        self.pipe = build_tiny_sd3(self.sizes, corpus)
        self.vae = self.pipe.vae
        self.denoiser = self.pipe.transformer
        self.text_encoders = torch.nn.ModuleList(
            [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]
        )

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before hours of training."""
        check_folder(Path(self.output), INFO_FILE, "a pretrained pipeline", replace=True)
        check_writable(Path(self.output))

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        first = self.autoencoder_steps

        def autoencoder(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * step / first)) if step < first else 0.0

        def denoiser(step: int) -> float:
            step, length = step - first, max(total - first, 1)
            if step < 0:
                return 0.0
            return min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / length))

        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.vae.parameters()), "lr": self.autoencoder_lr},
                {"params": [*self.denoiser.parameters(), *self.text_encoders.parameters()], "lr": self.lr},
            ],
            weight_decay=0.01,
            betas=(0.9, 0.99),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [autoencoder, denoiser])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step < self.autoencoder_steps:
            loss = self._autoencoder_loss(batch["image"])
            self.log("loss/autoencoder", loss, prog_bar=True)
            return loss
        if self.global_step == self.autoencoder_steps:
            self._normalise_latents()
        loss = self._denoising_loss(batch["image"], list(batch["prompt"]))
        self.log("loss/denoise", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        decoded = self.vae.decode(self.vae.encode(batch["image"]).latent_dist.mode()).sample
        self.log("val/autoencoder_mse", (decoded - batch["image"]).square().mean())

    def _autoencoder_loss(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        return (decoded - images).square().mean() + self.kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def _normalise_latents(self) -> None:
        """Give the latents zero mean and unit variance through the VAE's own shift and scaling factors."""
        images = self.trainer.datamodule.train.images.to(self.device)  # type: ignore[attr-defined]
        latents = self.vae.encode(images).latent_dist.sample()
        self.vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))

    def _denoising_loss(self, images: Tensor, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.sample()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        dropped = torch.rand(len(prompts)) < self.prompt_dropout
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sizes.text_length,
        )
        noise = torch.randn_like(latents)
        sigmas = flow.sample_sigmas(len(latents)).to(latents)
        prediction = self.denoiser(
            hidden_states=flow.add_noise(latents, noise, sigmas),
            timestep=sigmas * flow.NUM_TRAIN_TIMESTEPS,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        return flow.loss_per_sample(prediction, latents, noise).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            with whole_folder(Path(self.output), INFO_FILE, replace=True) as folder:
                self.pipe.transformer.half()  # halves the file; loaded as float32 these rounded weights are the model
                self.pipe.save_pretrained(folder)
                info = PipelineInfo("", self.call, "digits", prompts=PROMPTS)
                write_json(folder / INFO_FILE, info.to_json())
