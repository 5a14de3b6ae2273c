"""Emoji with captions: the pictures of Noto Color Emoji, drawn once into an atlas that ships with the package.

Pictures are float32 in [-1, 1], shape (3, 32, 32), on white. Names are Unicode's short names in plain lower-case words
(:func:`plain_name`); groups are Unicode's. ``python -m obsdiff.embedded.draw_emoji`` draws the atlas anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError

TILE = 32
COLUMNS = 64
ORDER_SEED = 0
ATLAS, NAMES = "atlas.png", "names.json"

TRAIN_WORDINGS = (
    "{}",
    "{a}",
    "{} emoji",
    "emoji of {a}",
    "picture of {}",
    "{a} icon",
    "icon showing {a}",
    "drawing of {a}",
)
HELD_OUT_WORDINGS = ("icon of {a}", "picture showing {a}", "{} drawing", "emoji showing {}")
WORDING_WORDS = frozenset(re.findall(r"[a-z]+", " ".join(TRAIN_WORDINGS + HELD_OUT_WORDINGS))) | {"a", "an"}
SIGNS = {"#": " hash ", "*": " asterisk ", "&": " and ", "’": "", "'": ""}
VOWELS_SAID_AS_CONSONANTS = ("uni", "euro", "one", "ukulele", "uk ", "us ", "up ")


@dataclass(frozen=True)
class Emoji:
    """The emoji of the atlas.

    Attributes:
        names: Their plain names, all different.
        groups: The group of each, such as "Animals & Nature".
        pixels: (n, 32, 32, 3) uint8.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    pixels: Tensor

    def images(self) -> Tensor:
        """All pictures, float32 (n, 3, 32, 32) in [-1, 1]."""
        return self.pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def plain_name(name: str) -> str:
    """A name or caption in words of a-z and 0-9: accents off, signs spelt, apostrophes closed, the rest is space."""
    for sign, word in SIGNS.items():
        name = name.replace(sign, word)
    letters = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", letters))


def with_article(name: str) -> str:
    """ "a red apple", "an owl", "grapes": by the first letter, and none before what looks like a plural."""
    last = name.split(" of ")[0].split(" with ")[0].split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is", "as")):
        return name
    vowel = name[0] in "aeiou" and not name.startswith(VOWELS_SAID_AS_CONSONANTS)
    return f"{'an' if vowel else 'a'} {name}"


def caption(wording: str, name: str) -> str:
    """A wording about an emoji: ``{}`` is its name, ``{a}`` its name with an article."""
    return wording.format(name, a=with_article(name))


def emoji_prompts(wordings: Sequence[str]) -> list[str]:
    """One wording of every name, then another: any first 1,886 k prompts hold every emoji k times.

    Names come in an order drawn by ``ORDER_SEED``, so that the first of them are of all groups, and the wording changes
    from name to name, so that they hold all wordings.
    """
    names, n = load_emoji().names, len(wordings)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
    return [caption(wordings[(turn + i) % n], names[place]) for turn in range(n) for i, place in enumerate(order)]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt as the vocabulary spells them."""
    return plain_name(prompt).split()


@cache
def vocabulary() -> frozenset[str]:
    """Every word of every caption."""
    return WORDING_WORDS | {word for name in load_emoji().names for word in name.split()}


def spell(prompt: str) -> tuple[str, list[str]]:
    """A prompt in the words that captions have, and the words it loses by that, in order, each once."""
    words, known = words_of(prompt), vocabulary()
    return " ".join(word for word in words if word in known), [w for w in dict.fromkeys(words) if w not in known]


def emoji_of_prompt(prompt: str) -> int | None:
    """The emoji a prompt asks for: what is left without the words around a name, or the longest name it holds.

    None if it holds none, or several of that length.
    """
    words = words_of(prompt)
    places = _places()
    for length in range(len(words), 0, -1):
        held = (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
        found = {places[text] for text in held if text in places}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


@cache
def _places() -> dict[str, int]:
    return {name: i for i, name in enumerate(load_emoji().names)}


@cache
def load_emoji() -> Emoji:
    """The atlas of the package.

    Raises:
        UserError: It is not what was drawn.
    """
    folder = files("obsdiff.data.assets").joinpath("emoji")
    return read_atlas(folder.joinpath(ATLAS).read_bytes(), folder.joinpath(NAMES).read_bytes(), str(folder))


def read_atlas(atlas: bytes, names: bytes, where: str) -> Emoji:
    """The emoji of an atlas picture and its list of names.

    Args:
        atlas: A PNG of ``COLUMNS`` tiles a row.
        names: JSON: ``sha256`` of the tiles' pixels, and ``emoji``: rows of text, name and group.
        where: Their folder, for errors.

    Raises:
        UserError: They are damaged, or do not belong together.
    """
    import io

    from PIL import Image

    again = "install obsdiff again, or draw it with python -m obsdiff.embedded.draw_emoji"
    try:
        listed: Any = json.loads(names)
        rows = [(str(name), str(group)) for _, name, group in listed["emoji"]]
        wanted = listed["sha256"]
        with Image.open(io.BytesIO(atlas)) as picture:
            data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            width, height = picture.size
        if width != COLUMNS * TILE or height % TILE or height // TILE * COLUMNS < len(rows):
            raise ValueError(f"{width} x {height} pixels do not hold {len(rows)} emoji")
    except (ValueError, TypeError, KeyError, OSError, SyntaxError) as error:  # Pillow raises SyntaxError, too
        raise UserError(
            f"the emoji atlas in {where} is damaged ({' '.join(str(error).split())[:80]}); {again}"
        ) from None
    tiles = data.view(height // TILE, TILE, COLUMNS, TILE, 3).transpose(1, 2).reshape(-1, TILE, TILE, 3)[: len(rows)]
    if pixel_hash(tiles) != wanted:
        raise UserError(f"the emoji atlas in {where} is damaged (its pixels are not those that were drawn); {again}")
    return Emoji(tuple(name for name, _ in rows), tuple(group for _, group in rows), tiles.clone())


def pixel_hash(pixels: Tensor) -> str:
    """SHA-256 of uint8 pixels."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
