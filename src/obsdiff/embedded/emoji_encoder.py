"""The embedded image encoder of emoji: it names what it sees, and distances are taken between its features."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
from torch import Tensor, nn

from obsdiff.embedded.emoji import TILE

FEATURE_DIM = 128
CHANNELS = (32, 64, 96, 128)
BATCH = 128  # images looked at together: the atlas in one go takes half a gigabyte


class EmojiEncoder(nn.Module):
    """A small convolutional network on images (n, 3, h, w) in [-1, 1] of any size; others are resized to 32 x 32."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, channels in enumerate(CHANNELS):
            layers += [nn.Conv2d(before, channels, 3, stride=1 if stage == 0 else 2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.body = nn.Sequential(*layers, nn.Conv2d(before, FEATURE_DIM, 4, groups=FEATURE_DIM // 2), nn.Flatten())
        self.head = nn.Linear(FEATURE_DIM, classes)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate activations (n, 128), float32."""
        images = images.float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[-2:] != (TILE, TILE):
            images = nn.functional.interpolate(images, size=(TILE, TILE), mode="bilinear", antialias=True)
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


@cache
def load_encoder() -> EmojiEncoder:
    """The trained encoder from the package's assets, in eval mode, float32, without gradients."""
    from safetensors.torch import load

    weights = load(files("obsdiff.data.assets").joinpath("emoji-encoder", "model.safetensors").read_bytes())
    model = EmojiEncoder(len(weights["head.weight"])).float()
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def ranked_emoji(images: Tensor, k: int) -> Tensor:
    """The ``k`` likeliest emoji in each of the images (n, c, h, w) in [0, 1], likeliest first, int64 (n, k)."""
    return load_encoder()(images * 2 - 1).topk(k, 1).indices


@torch.no_grad()
def emoji_features(images: Tensor) -> Tensor:
    """The encoder's features (n, 128) of images (n, c, h, w) in [0, 1]."""
    return torch.cat([load_encoder().features(part * 2 - 1) for part in images.split(BATCH)])
