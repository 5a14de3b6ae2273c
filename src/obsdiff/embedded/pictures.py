"""Pictures beside the pictures of an atlas: the nearest of them in pixels, and grids to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from obsdiff.files import whole_file


def nearest_pictures(images: Tensor, atlas: Tensor, k: int) -> Tensor:
    """The ``k`` pictures of ``atlas`` (m, c, h, w) nearest to each of ``images`` (n, c, h, w) in squared error of
    pixels, nearest first, int64 (n, k)."""
    return torch.cdist(images.flatten(1), atlas.flatten(1)).topk(k, largest=False).indices


def save_grid(rows: Sequence[Tensor], path: Path, scale: int = 2) -> None:
    """Write a PNG of pictures in rows, each (n, 3, h, w) in [-1, 1], enlarged ``scale`` times without smoothing."""
    from PIL import Image
    from torchvision.utils import make_grid

    sheet = torch.cat([make_grid(row, nrow=len(row), padding=1, pad_value=1.0) for row in rows], 1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
