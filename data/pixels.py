"""Image files to pixels of one size, whatever their mode; anything that cannot be decoded is :class:`Undecodable`."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_PIXELS = 2**27  # after resizing; a strip a pixel wide would fill the memory
STARTS_PROGRAMS = ("EPS",)  # formats that Pillow hands to another program


class Undecodable(Exception):
    """An image that is missing, damaged, or of values without a known range."""


def decode(content: Any, size: int, channels: int) -> Tensor:
    """Pixels (channels, size, size) in [-1, 1], float32: the shorter side resized to ``size``, the middle cut out.

    Turned as EXIF says; the first frame of several. Transparent parts lie on white. Grey levels of 16 bits are scaled
    to 8. Floats are taken to lie in [0, 1], integers in [0, 65535]; images with others have no known range and are
    not decoded.

    Args:
        content: ``bytes``, or None and the ``path`` of a file, as datasets gives it.
        size: Pixels per side.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        Undecodable: It cannot be.
    """
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def cut(upright: Any) -> Tensor:
        shorter, longer = sorted(upright.size)
        if longer * size * size > MAX_PIXELS * shorter:
            raise Undecodable(f"{shorter} by {longer} pixels is too long a strip")
        return prepare(upright.convert("RGB" if channels == 3 else "L"))

    return _opened(content, cut).float() / 127.5 - 1


def pixels_of(content: Any) -> Tensor:
    """All pixels of an image, uint8 (3, h, w), read as :func:`decode` does but neither resized nor cut.

    Raises:
        Undecodable: It cannot be decoded.
    """
    from torchvision.transforms.functional import pil_to_tensor

    return _opened(content, lambda upright: pil_to_tensor(upright.convert("RGB")))


def _opened(content: Any, pixels: Callable[[Any], Tensor]) -> Tensor:
    """``pixels`` of the upright image in modes of 8 bits."""
    from PIL import Image, ImageOps

    try:
        Image.init()
        formats = [name for name in Image.ID if name not in STARTS_PROGRAMS]
        with Image.open(_file(content), formats=formats) as image:
            return pixels(_on_white(_in_8_bits(ImageOps.exif_transpose(image))))
    except Undecodable:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files and bombs
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _file(content: Any) -> Any:
    """What Pillow opens: the bytes, or a path that leads to a plain file (a device would never end)."""
    if content is None:
        raise Undecodable("there is no image")
    if content["bytes"] is not None:
        return BytesIO(content["bytes"])
    if not Path(content["path"]).is_file():
        raise Undecodable(f"{content['path']} is not a file")
    return content["path"]


def _in_8_bits(image: Any) -> Any:
    """The image; wider grey levels scaled to 8 bits, which Pillow would clip."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    if not image.mode.startswith(("I", "F")):
        return image
    floats = image.mode == "F"
    values = pil_to_tensor(image if floats else image.convert("I")).double()
    top = 1.0 if floats else 65535.0
    if not bool(((values >= 0) & (values <= top)).all()):
        raise Undecodable(f"values beyond 0 to {top:g} have no known range")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = values.where(values != transparent, top)
    return to_pil_image((values / top * 255).round().byte())


def _on_white(image: Any) -> Any:
    """The image; transparent parts mixed with white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
