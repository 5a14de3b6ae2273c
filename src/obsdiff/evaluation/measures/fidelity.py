"""How far images are from the dense pipeline's of the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from obsdiff.errors import UserError
from obsdiff.evaluation.measures.base import Batch, Figures, Measure

SSIM_WINDOW = 11  # pixels
SMALLEST = 64  # pixels that AlexNet can take


class SquaredError(Measure):
    """Mean squared error, and its PSNR in dB for a range of 1 (None for identical images)."""

    columns = ("mse",)

    def rows_of(self, batch: Batch) -> Tensor:
        assert batch.dense is not None
        return (batch.dense.double() - batch.images.double()).square().flatten(1).mean(1, keepdim=True)

    def figures(self, rows: Tensor) -> Figures:
        found = super().figures(rows)
        return found | {"psnr": -10 * math.log10(found["mse"]) if found["mse"] else None}


class StructuralSimilarity(Measure):
    """SSIM (Wang et al. 2004); none of images below 11 pixels."""

    columns = ("ssim",)

    def rows_of(self, batch: Batch) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        assert batch.dense is not None
        if min(batch.images.shape[-2:]) < SSIM_WINDOW:
            return torch.full((len(batch.images), 1), math.nan)
        values = structural_similarity_index_measure(batch.images, batch.dense, reduction="none", data_range=1.0)
        assert isinstance(values, Tensor)
        return values.reshape(-1, 1)

    def figures(self, rows: Tensor) -> Figures:
        return {} if bool(rows.isnan().any()) else super().figures(rows)


class PatchSimilarity(Measure):
    """LPIPS with the AlexNet trunk (1801.03924), by torchmetrics.

    Args:
        distance: Two batches of images (n, c, h, w) in [0, 1] to their distances (n,).
    """

    columns = ("lpips",)

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._distance = distance

    @classmethod
    def loaded(cls) -> PatchSimilarity:
        """With its weights at hand.

        Raises:
            UserError: They can be neither found nor fetched.
        """
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            network = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
        except OSError as error:  # of urllib
            place = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(
                f"lpips needs torchvision's weights of AlexNet (alexnet-owt-7be5be79.pth) in {place}"
            ) from error

        def distance(images: Tensor, others: Tensor) -> Tensor:
            found: Tensor = network(images, others)
            network.reset()  # it would keep them all
            return found

        return cls(distance)

    def rows_of(self, batch: Batch) -> Tensor:
        assert batch.dense is not None
        return self._distance(*map(_large, (batch.images, batch.dense))).reshape(-1, 1)


class FeatureDistance(Measure):
    """Cosine distance in [0, 2] of the features of each image to those of the dense one.

    Args:
        name: What it is called.
        extract: Images (n, c, h, w) in [0, 1] to features (n, d).
    """

    def __init__(self, name: str, extract: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.columns, self.extract = (name,), extract

    def rows_of(self, batch: Batch) -> Tensor:
        own, dense = (batch.features(self.extract, which) for which in (False, True))
        return 1 - cosine_similarity(own, dense)[:, None]


def _large(images: Tensor) -> Tensor:
    """Images (n, 1 or 3, h, w) in colour, and not smaller than the trunk takes."""
    factor = max(1.0, SMALLEST / min(images.shape[-2:]))
    return interpolate(images.expand(-1, 3, -1, -1), scale_factor=factor, mode="bilinear")
