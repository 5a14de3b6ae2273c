"""Training the embedded pipeline ``digits-ddpm`` from scratch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from obsdiff.diffusion.noising import DiffusionNoising
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.files import check_folder, check_writable, whole_folder, write_json
from obsdiff.models.info import INFO_FILE, PipelineInfo


class DigitsDDPMPretraining(lightning.LightningModule):
    """Trains a tiny DDPM pipeline on the noise of its own schedule, ``‖ε − ε_θ(x_t, t)‖²`` (2006.11239 eq. 14).

    What is validated and stored is an exponential moving average of the weights.

    Args:
        output: Folder that receives the finished pipeline (written whole, at the end of the fit).
        lr: Peak learning rate (AdamW, linear warm-up, cosine to zero).
        warmup_steps: Of the warm-up.
        ema_decay: Of the average.
        call: The pipeline's own call defaults, stored beside it.
        sizes: Widths and depths of the pipeline.
    """

    def __init__(
        self,
        output: str,
        lr: float = 1e-3,
        warmup_steps: int = 200,
        ema_decay: float = 0.999,
        call: dict[str, int | float] | None = None,
        sizes: TinyDDPM | None = None,
    ) -> None:
        super().__init__()
        self.output = output
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.call = call or {}
        self.pipe = build_tiny_ddpm(sizes or TinyDDPM())
        self.denoiser = self.pipe.unet
        self.average = AveragedModel(self.denoiser, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)).requires_grad_(False)
        self.noising = DiffusionNoising(self.pipe.scheduler.alphas_cumprod)

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before training."""
        check_folder(Path(self.output), INFO_FILE, "a pretrained pipeline", replace=True)
        check_writable(Path(self.output))

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

        optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        loss = self._loss(self.denoiser, images, torch.randn_like(images), self.noising.draw(len(images)))
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.average.update_parameters(self.denoiser)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same noise and times at every validation, so that its losses compare."""
        generator = torch.Generator().manual_seed(batch_idx)
        images = batch["image"]
        noise = torch.randn(images.shape, generator=generator).to(images)
        self.log("val/loss", self._loss(self.average, images, noise, self.noising.draw(len(images), generator)))

    def _loss(self, denoiser: Any, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        times = times.to(images.device)
        answer = denoiser(self.noising.add_noise(images, noise, times), times).sample
        return torch.nn.functional.mse_loss(answer, self.noising.target(images, noise, times))

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            with whole_folder(Path(self.output), INFO_FILE, replace=True) as folder:
                self.denoiser.load_state_dict(self.average.module.state_dict())
                self.pipe.unet.register_to_config(dropout=0.0)  # a distillation wants the student's own answers
                self.pipe.unet.half()  # halves the file; loaded as float32 these rounded weights are the model
                self.pipe.save_pretrained(folder)
                write_json(folder / INFO_FILE, PipelineInfo("", self.call, "digits").to_json())
