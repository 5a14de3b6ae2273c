"""Training the embedded pipeline ``emoji-sd3`` from scratch, on the latents of a trained autoencoder."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from obsdiff.diffusion import flow
from obsdiff.embedded.autoencoder import encode, load_autoencoder
from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, TRAIN_WORDINGS, emoji_prompts, load_emoji
from obsdiff.embedded.pictures import nearest_pictures, save_grid
from obsdiff.embedded.tiny_sd3 import TinySD3, build_tiny_sd3
from obsdiff.files import check_folder, check_writable, whole_folder, write_json
from obsdiff.models.info import INFO_FILE, PipelineInfo

PROMPTS = {"calibration": "emoji-train", "evaluation": "emoji-heldout"}
TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Learning:
    """How the weights are learned. The rates follow a cosine over the share that is done of the trainer's steps, or
    of the time if that is further.

    Attributes:
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon on the matrices of the transformer's blocks, at AdamW's root mean square
            (arXiv:2502.16982 eq. 4); 0 leaves them to AdamW.
        warmup_steps: Linear warm-up.
        weight_decay: Of both.
        ema_decay: Of the average of all weights; the average is what is kept.
        prompt_dropout: Share of prompts replaced by the empty one, for classifier-free guidance.
        max_time_s: Training time after which the fit ends, validations included; None for the trainer's steps alone.
    """

    lr: float = 2e-3
    muon_lr: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    prompt_dropout: float = 0.1
    max_time_s: float | None = None


class EmojiSD3Pretraining(lightning.LightningModule):
    """Trains transformer and text encoders together by flow matching on latents that are encoded once.

    Args:
        output: Folder that receives the finished pipeline with averaged weights (written whole, at the end of the fit).
        autoencoder: Folder of the trained autoencoder.
        samples: Folder that receives a grid of samples over true pictures at each validation.
        sizes: Widths and depths of the pipeline.
        learning: How it is trained.
        call: The pipeline's own call defaults, stored beside it; the validation samples with them.
        compile_denoiser: Whether torch compiles the transformer (minutes at the start, fewer seconds a step).
    """

    def __init__(
        self,
        output: str,
        autoencoder: str,
        samples: str,
        sizes: TinySD3,
        learning: Learning,
        call: dict[str, int | float],
        compile_denoiser: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.output, self.autoencoder, self.samples = output, autoencoder, samples
        self.sizes, self.learning, self.call = sizes, learning, call
        self.elapsed_s, self.began_s = 0.0, 0.0
        corpus = [*emoji_prompts(TRAIN_WORDINGS), *emoji_prompts(HELD_OUT_WORDINGS)]
        self.pipe = build_tiny_sd3(sizes, corpus)
        self.trained = torch.nn.ModuleDict({name: getattr(self.pipe, name) for name in TRAINED}).eval()
        self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(learning.ema_decay))
        self.average.requires_grad_(False)
        if compile_denoiser:
            self.pipe.transformer.compile()

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before hours of training; encode the atlas."""
        vae = load_autoencoder(self.autoencoder).requires_grad_(False)
        check_folder(Path(self.output), INFO_FILE, "a pretrained pipeline", replace=True)
        check_writable(Path(self.output))
        self.pipe.register_modules(vae=vae)
        self.tokens = self._tokenize(["", *emoji_prompts(TRAIN_WORDINGS)])
        self.register_buffer("latents", encode(vae, load_emoji().images()), persistent=False)

    def _tokenize(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """CLIP's and T5's tokens of each prompt, as the pipeline makes them."""
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_3
        rows = [
            tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
            for tokenizer, length in ((clip, self.sizes.text_length), (t5, self._t5_length))
        ]
        return {prompt: (a, b) for prompt, a, b in zip(prompts, *rows, strict=True)}

    @property
    def _t5_length(self) -> int:
        return self.sizes.t5_length or self.sizes.text_length

    def _embed(self, clip_tokens: Tensor, t5_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (n, tokens, width) and pooled ones of tokens, as ``StableDiffusion3Pipeline.encode_prompt``."""
        read = [
            encoder(clip_tokens, output_hidden_states=True)
            for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2)
        ]
        clip = torch.cat([output.hidden_states[-2] for output in read], -1)
        t5 = self.pipe.text_encoder_3(t5_tokens)[0]
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], -2), torch.cat([output.text_embeds for output in read], -1)

    def configure_optimizers(self) -> Any:
        plan = self.learning
        blocks = self.pipe.transformer.transformer_blocks if plan.muon_lr else torch.nn.ModuleList()
        matrices = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
        taken = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.trained.parameters() if id(parameter) not in taken]
        adamw = torch.optim.AdamW(rest, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True)
        if not matrices:
            return [adamw]
        muon = torch.optim.Muon(
            matrices, lr=plan.muon_lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [adamw, muon]

    def on_train_start(self) -> None:
        self.began_s = time.monotonic() - self.elapsed_s

    def _done(self) -> float:
        """The share of the training that is done."""
        total = float(self.trainer.max_steps) if self.trainer.max_steps > 0 else math.inf
        self.elapsed_s = time.monotonic() - self.began_s
        return min(max(self.global_step / total, self.elapsed_s / (self.learning.max_time_s or math.inf)), 1.0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        plan = self.learning
        share = min(1.0, (self.global_step + 1) / plan.warmup_steps) * 0.5 * (1 + math.cos(math.pi * self._done()))
        for optimizer, rate in zip(optimizers, (plan.lr, plan.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        # of few tokens, the fused attention's backward pass on CPUs takes longer than the whole step without it
        with sdpa_kernel(SDPBackend.MATH):
            loss = self._loss(batch["label"], list(batch["prompt"]))
            self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        for optimizer in optimizers[1:]:
            optimizer.optimizer.step()  # the trainer counts the first one's steps only
        optimizers[0].step()
        self.zero_grad()
        self.average.update_parameters(self.trained)
        self.log("loss/denoise", loss, prog_bar=True)
        if self._done() >= 1:
            self.trainer.should_stop = True

    def _loss(self, labels: Tensor, prompts: list[str]) -> Tensor:
        dropped = (torch.rand(len(prompts)) < self.learning.prompt_dropout).tolist()
        rows = [self.tokens["" if drop else prompt] for drop, prompt in zip(dropped, prompts, strict=True)]
        clip, t5 = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
        embeds, pooled = self._embed(clip, t5)
        latents: Tensor = self.latents[labels]  # type: ignore[index]  # a buffer
        noise = torch.randn_like(latents)
        sigmas = flow.sample_sigmas(len(latents)).to(latents)
        prediction = self.pipe.transformer(
            hidden_states=flow.add_noise(latents, noise, sigmas),
            timestep=sigmas * flow.NUM_TRAIN_TIMESTEPS,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return flow.loss_per_sample(prediction, latents, noise).mean()

    def averaged_pipeline(self) -> Any:
        """The pipeline with the averaged weights, which it shares with this module."""
        from diffusers import StableDiffusion3Pipeline

        average: Any = self.average.module
        return StableDiffusion3Pipeline(**{**self.pipe.components, **{name: average[name] for name in TRAINED}})

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pipe = self.averaged_pipeline()
        pipe.set_progress_bar_config(disable=True)
        with torch.autocast(self.device.type, enabled=False):
            images = pipe(
                list(batch["prompt"]),
                generator=torch.Generator().manual_seed(batch_idx),
                output_type="pt",
                **self.call,
            ).images
        images = images.float().cpu() * 2 - 1
        nearest = nearest_pictures(images, load_emoji().images(), 5)
        hits = (nearest == batch["label"].cpu()[:, None]).float()
        self.log_dict(
            {"val/top1": hits[:, 0].mean(), "val/top5": hits.sum(1).mean()}, batch_size=len(hits), prog_bar=True
        )
        if batch_idx == 0:
            rows = [
                part for pair in zip(images.split(16), batch["image"].cpu().split(16), strict=True) for part in pair
            ]
            save_grid(rows, Path(self.samples) / f"step-{self.global_step:06d}.png")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elapsed_s"] = self.elapsed_s

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.elapsed_s = float(checkpoint["elapsed_s"])

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            save_emoji_pipeline(self.averaged_pipeline(), self.call, Path(self.output))


def save_emoji_pipeline(pipe: Any, call: dict[str, int | float], output: Path) -> None:
    """Write a pipeline of emoji with its habits, in float16 (which halves it; the rounded weights are the model)."""
    with whole_folder(output, INFO_FILE, replace=True) as folder:
        for name in ("vae", *TRAINED):
            pipe.register_modules(**{name: deepcopy(getattr(pipe, name)).half()})
        pipe.save_pretrained(folder)
        write_json(folder / INFO_FILE, PipelineInfo("", call, "emoji", prompts=PROMPTS).to_json())
