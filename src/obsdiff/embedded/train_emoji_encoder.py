"""Training the embedded image encoder of emoji from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional

from obsdiff.embedded.emoji import load_emoji
from obsdiff.embedded.emoji_encoder import EmojiEncoder
from obsdiff.files import check_folder, check_writable, whole_folder, write_json

ENCODER = "config.json"


class EmojiEncoderTraining(lightning.LightningModule):
    """Trains the encoder to name every picture of the atlas, moved, scaled, blurred, recoloured and under noise.

    Args:
        output: Folder that receives ``model.safetensors`` (float16) and ``config.json`` with its accuracy.
        lr: Peak learning rate (AdamW, one cycle).
    """

    def __init__(self, output: str, lr: float = 4e-3) -> None:
        super().__init__()
        self.output, self.lr = output, lr
        self.encoder = EmojiEncoder(len(load_emoji().names))
        self.seen: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before training."""
        check_folder(Path(self.output), ENCODER, "a trained encoder", replace=True)
        check_writable(Path(self.output))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.encoder(changed(batch["image"]))
        loss: Tensor = functional.cross_entropy(logits, batch["label"], label_smoothing=0.05)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        ranked = self.encoder(held_out(batch["image"])).topk(5, 1).indices
        self.seen.append(ranked == batch["label"][:, None])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self._accuracy().items()}, prog_bar=True)

    def _accuracy(self) -> dict[str, float]:
        hits = torch.cat(self.seen).float()
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits.sum(1).mean())}

    def on_train_end(self) -> None:
        from safetensors.torch import save_file

        if self.trainer.is_global_zero:
            weights = {
                name: value.half().contiguous() if value.is_floating_point() else value
                for name, value in self.encoder.state_dict().items()
            }
            with whole_folder(Path(self.output), ENCODER, replace=True) as folder:
                save_file(weights, folder / "model.safetensors")
                count = sum(len(part) for part in self.seen)
                write_json(folder / ENCODER, {"held_out_accuracy": self._accuracy(), "num_held_out_images": count})


def changed(images: Tensor) -> Tensor:
    """Each image (n, 3, h, w) in [-1, 1] moved by up to 3 pixels, scaled, recoloured, some blurred, some with a piece
    missing, all under noise of its own strength."""
    n, _, height, width = images.shape
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.4 * (torch.rand(n, device=images.device) - 0.5)
    theta[:, :, 2] = 0.36 * (torch.rand(n, 2, device=images.device) - 0.5)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    out = functional.grid_sample(images - 1, grid, align_corners=False) + 1  # white outside
    blurred = functional.avg_pool2d(functional.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1)
    strength = _each(n, images) * (_each(n, images) < 0.5)
    out = torch.lerp(out, blurred, strength)
    gain, offset = 1 + 0.3 * (_each(n, images, 3) - 0.5), 0.3 * (_each(n, images, 3) - 0.5)
    out = out * gain + offset
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    top, left = (torch.randint(0, size - 7, (n, 1), device=images.device) for size in (height, width))
    hole = ((rows >= top) & (rows < top + 8))[:, None, :, None] & ((columns >= left) & (columns < left + 8))[
        :, None, None
    ]
    out = torch.where(hole & (_each(n, images) < 0.3), 1.0, out)
    return out + 0.25 * _each(n, images) * torch.randn_like(out)


def _each(n: int, like: Tensor, channels: int = 1) -> Tensor:
    return torch.rand(n, channels, 1, 1, device=like.device)


def held_out(images: Tensor) -> Tensor:
    """A change that training never makes: turned by 6 degrees, at half the resolution, darker by a tenth."""
    turn = torch.tensor(6 * torch.pi / 180)
    theta = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    theta = torch.cat([theta, torch.zeros(2, 1)], 1).to(images).expand(len(images), -1, -1)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    out = functional.grid_sample(images - 1, grid, align_corners=False) + 1
    half = functional.interpolate(out, scale_factor=0.5, mode="bilinear", antialias=True)
    out = functional.interpolate(half, size=images.shape[-2:], mode="bilinear")
    return out * 0.9 - 0.1
