"""The embedded digit classifier: alignment measure and feature space of the digit pipelines."""

from __future__ import annotations

from importlib.resources import files

import torch
from torch import Tensor, nn

FEATURE_DIM = 64


class DigitClassifier(nn.Module):
    """A small convolutional network on images (n, c, h, w) in [-1, 1] of any size; the channels are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GroupNorm(4, 24),
            nn.GELU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GroupNorm(4, 48),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(48 * 16, FEATURE_DIM),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURE_DIM, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (n, 64), float32."""
        gray = images.float().mean(1, keepdim=True)
        if gray.shape[-2:] != (16, 16):
            gray = nn.functional.interpolate(gray, size=(16, 16), mode="bilinear", antialias=True)
        features: Tensor = self.body(gray)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_classifier(device: str | torch.device = "cpu") -> DigitClassifier:
    """The trained classifier from the package's assets, in eval mode, without gradients."""
    from safetensors.torch import load

    weights = files("obsdiff.data.assets").joinpath("digits-classifier", "model.safetensors").read_bytes()
    model = DigitClassifier().float()  # whatever is the default while a run in another dtype makes it
    model.load_state_dict(load(weights))
    return model.to(device).eval().requires_grad_(False)
