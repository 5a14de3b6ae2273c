"""Every mode of Pillow's becomes the right pixels, and everything that cannot be decoded is told apart from them."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff.data.pixels import Undecodable, decode


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def decoded(image, kind="PNG", size=8, channels=3, **options):
    return decode(encoded(image, kind, **options), size, channels)


def levels(pixels):
    """Back to 0 to 255."""
    return ((pixels + 1) * 127.5).round().int()


def test_rgb_is_what_it_was():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert torch.equal(levels(decoded(image)), torch.arange(192, dtype=torch.int).view(8, 8, 3).permute(2, 0, 1))
    assert decoded(image, channels=1).shape == (1, 8, 8)
    assert decoded(image).dtype == torch.float32


def test_the_orientation_of_exif_is_followed():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    pixels = levels(decoded(image, exif=exif))
    assert int(pixels[:, :, 4:].min()) == 255 and int(pixels[:, :, :4].max()) == 0


@pytest.mark.parametrize("big_endian", [False, True])
def test_16_bits_are_scaled_to_8(big_endian):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = torch.from_numpy(np.round(values / 257).astype(np.int32)).expand(3, 8, 8)
    image = Image.fromarray(values)
    if big_endian:
        image = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    pixels = decoded(image, "TIFF" if big_endian else "PNG")
    assert torch.equal(levels(pixels), expected)


def test_wide_integers_have_a_range_or_are_refused():
    values = np.full((8, 8), 32896, dtype=np.int32)
    assert int(levels(decoded(Image.fromarray(values), "TIFF")).unique()) == 128
    for wrong in (-1, 65536):
        values[0, 0] = wrong
        with pytest.raises(Undecodable, match="no known range"):
            decoded(Image.fromarray(values), "TIFF")


def test_floats_lie_between_0_and_1_or_are_refused():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = torch.from_numpy(np.round(values * 255).astype(np.int32))
    assert torch.equal(levels(decoded(Image.fromarray(values), "TIFF", channels=1))[0], expected)
    for wrong in (1.5, -0.1, float("nan"), float("inf")):
        values[0, 0] = wrong
        with pytest.raises(Undecodable, match="no known range"):
            decoded(Image.fromarray(values), "TIFF")


def test_transparent_parts_lie_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert int(levels(decoded(clear)).min()) == 255
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert levels(decoded(half))[:, 0, 0].tolist() == [255, 127, 127]
    assert levels(decoded(Image.new("LA", (8, 8), (0, 128)), channels=1))[0, 0, 0] == 127
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    assert levels(decoded(palette))[:, 0, 0].tolist() == [0, 200, 0]
    assert int(levels(decoded(palette, transparency=1)).min()) == 255
    grey = Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16))
    content = encoded(grey)["bytes"]
    key = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 1000)
    key += struct.pack(">I", zlib.crc32(key[4:]))
    keyed = {"bytes": content[:33] + key + content[33:], "path": None}
    assert int(levels(decode(keyed, 8, 3)).min()) == 255


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("1", 1, "PNG", [255, 255, 255]),
        ("L", 77, "PNG", [77, 77, 77]),
        ("CMYK", (0, 255, 255, 0), "TIFF", [255, 0, 0]),
        ("CMYK", (0, 255, 255, 0), "JPEG", [255, 0, 0]),
        ("YCbCr", (76, 85, 255), "TIFF", [254, 0, 0]),
    ],
)
def test_other_modes(mode, colour, kind, expected):
    pixels = levels(decoded(Image.new(mode, (8, 8), colour), kind))
    assert all(abs(found - wanted) <= 2 for found, wanted in zip(pixels[:, 4, 4].tolist(), expected, strict=True))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = levels(decoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def bomb():
    """A PNG that says it has 2**30 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 2**15, 2**15, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(Image.new("RGB", (8, 8)))["bytes"][33:]


PNG = encoded(Image.effect_noise((32, 32), 50))["bytes"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"not an image", "path": None},
        {"bytes": PNG[: len(PNG) // 2], "path": None},
        {"bytes": PNG[:20] + b"\0" * 8 + PNG[28:], "path": None},
        {"bytes": bomb(), "path": None},
        {"bytes": None, "path": "/nowhere/a.png"},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": None, "path": "https://example.org/a.png"},
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "path": None},
        {"bytes": PNG[:100] + b"\xff" * 40 + PNG[140:], "path": None},
        "a.png",
        [1, 2],
    ],
)
def test_what_cannot_be_decoded(content):
    with pytest.raises(Undecodable):
        decode(content, 8, 3)


def test_a_strip_that_would_fill_the_memory_is_not_resized():
    strip = Image.new("L", (60_000, 1))
    assert decoded(strip, size=16).shape == (3, 16, 16)
    with pytest.raises(Undecodable, match="1 by 60000 pixels is too long a strip"):
        decoded(strip, size=512)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"\0" * 40, b"Exif\0\0MM\0*" + b"\7" * 99]
)
def test_damaged_exif_ends_nothing(exif):
    assert levels(decoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=exif))[:, 0, 0].tolist() == [254, 0, 0]
