"""Real images that generated ones are compared with: their features, kept by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obsdiff.data.images import image_column_of, load_table
from obsdiff.data.pixels import Undecodable, pixels_of
from obsdiff.diffusion.frechet import factor_of_covariance
from obsdiff.errors import UserError
from obsdiff.evaluation.extractors import Extractor
from obsdiff.evaluation.measures.distribution import Real
from obsdiff.files import check_writable, whole_file
from obsdiff.models.content import model_hash
from obsdiff.paths import user_path
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.ranks import rank

BATCH = 64
SIDE = 64  # pixels of an image that any network takes


def real_of(name: str, extractor: Extractor, options: EvaluationOptions, each: bool) -> Callable[[], Real]:
    """What a measure compares with; read when it is first asked for, which raises a ``UserError`` of its own.

    Args:
        name: The measure.
        extractor: Its extractor.
        options: Of the evaluation.
        each: Whether it needs the features of each image, not only their statistics.

    Raises:
        UserError: There are no real images, and the extractor brings none; or their statistics are not what it needs.
    """
    if "@" not in name and extractor.real is not None:
        own = extractor.real
        return cache(lambda: Real.of(own()))
    if options.real is None:
        raise UserError(
            f"{name} needs real images: --evaluation.real FOLDER, a parquet file, a data set or clean-fid's .npz"
        )
    if options.real.endswith(".npz"):
        if each:
            raise UserError(f"{name} needs real images, not only their statistics: --evaluation.real FOLDER")
        mean, covariance = _moments(user_path(options.real, "evaluation.real"))
        width = extractor.features(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
        if mean.shape != (width,) or covariance.shape != (width, width):
            raise UserError(
                f"evaluation.real {options.real} holds statistics of {mean.numel():,} features, and {name} has "
                f"{width:,}: they were made by another network"
            )
        return cache(lambda: Real(None, mean, factor_of_covariance(covariance)))
    return cache(lambda: Real.of(_features(extractor, options)))


def _moments(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and covariance as clean-fid keeps them."""
    try:
        with numpy.load(path, allow_pickle=False) as found:
            mean, covariance = (torch.from_numpy(found[key]).double() for key in ("mu", "sigma"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"evaluation.real {path} holds no statistics (mu and sigma) as clean-fid writes them"
        ) from error
    return mean, covariance


def _features(extractor: Extractor, options: EvaluationOptions) -> Tensor:
    """Features of all real images, from the cache if they are there."""
    assert options.real is not None
    source = str(user_path(options.real, "evaluation.real")) if options.real.startswith("~") else options.real
    table = load_table(source, options.real_split, options.real_column)
    column = image_column_of(table.column_names, options.real_column)
    if len(table) < 2:
        raise UserError(f"evaluation.real {options.real} holds {len(table)} images; at least 2 are needed")
    if options.real_cache is None:
        return _extracted(extractor, table, column, options.real)
    digest = hashlib.sha256((extractor.says + extractor.prepares).encode())
    digest.update((model_hash(extractor.network) if extractor.network is not None else "").encode())
    for row in table:
        digest.update(hashlib.sha256(_bytes(row[column])).digest())
    file = user_path(options.real_cache, "evaluation.real_cache") / f"real-{digest.hexdigest()[:16]}.safetensors"
    try:
        with safe_open(file, framework="pt") as content:
            return content.get_tensor("features")
    except (OSError, SafetensorError):
        check_writable(file)
    found = _extracted(extractor, table, column, options.real)
    if rank() == 0:  # nobody waits for it: a process that starts later may find it
        with whole_file(file) as temporary:
            save_file({"features": found.contiguous()}, temporary)
    return found


def _bytes(content: Any) -> bytes:
    """Of an image; none where there is no image, which :func:`_batches` refuses."""
    if content is None:
        return b""
    if content["bytes"] is not None:
        return content["bytes"]
    path = Path(content["path"])
    return path.read_bytes() if path.is_file() else b""


def _extracted(extractor: Extractor, table: Any, column: str, source: str) -> Tensor:
    return torch.cat([extractor.features(batch) for batch in _batches(table, column, source)])


def _batches(table: Any, column: str, source: str) -> Iterator[Tensor]:
    """Images in [0, 1] of equal size, (n, 3, h, w) each."""
    held: list[Tensor] = []
    for number, row in enumerate(table):
        try:
            image = pixels_of(row[column]) / 255
        except Undecodable as error:
            raise UserError(f"image {number} of {source} cannot be read: {error}; mend or remove it") from error
        if held and (len(held) == BATCH or image.shape != held[0].shape):
            yield torch.stack(held)
            held = []
        held.append(image)
    yield torch.stack(held)
