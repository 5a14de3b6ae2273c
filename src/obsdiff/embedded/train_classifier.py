"""Training the embedded digit classifier from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from obsdiff.embedded.classifier import DigitClassifier
from obsdiff.files import check_folder, check_writable, whole_folder, write_json

CLASSIFIER = "config.json"


class DigitClassifierTraining(lightning.LightningModule):
    """Trains the embedded digit classifier; its class is the alignment measure, its features the Fréchet space.

    Args:
        output: Folder that receives ``model.safetensors`` and ``config.json`` with the test accuracy.
        lr: Peak learning rate (AdamW, one cycle).
    """

    def __init__(self, output: str, lr: float = 3e-3) -> None:
        super().__init__()
        self.output = output
        self.lr = lr
        self.classifier = DigitClassifier()
        self.accuracy = 0.0

    def setup(self, stage: str) -> None:
        """Refuse a place that holds anything else, before training."""
        check_folder(Path(self.output), CLASSIFIER, "a trained classifier", replace=True)
        check_writable(Path(self.output))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = _jitter(batch["image"])
        loss = torch.nn.functional.cross_entropy(self.classifier(images), batch["label"], label_smoothing=0.05)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.right = self.seen = 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.right += int((self.classifier(batch["image"]).argmax(1) == batch["label"]).sum())
        self.seen += len(batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.accuracy = self.right / self.seen
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def on_train_end(self) -> None:
        from safetensors.torch import save_file

        if self.trainer.is_global_zero:
            with whole_folder(Path(self.output), CLASSIFIER, replace=True) as folder:
                save_file(self.classifier.state_dict(), folder / "model.safetensors")
                write_json(folder / CLASSIFIER, {"test_accuracy": self.accuracy, "num_test_images": self.seen})


def _jitter(images: Tensor) -> Tensor:
    """Shift each image by up to one scan pixel and add a little noise, so that the classifier reads samples too."""
    n = len(images)
    shift = (torch.rand(n, 2, device=images.device) - 0.5) * 0.4
    scale = 1 + (torch.rand(n, device=images.device) - 0.5) * 0.2
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.randn_like(moved)
