"""The embedded encoder as the reader of images of emoji: what prompts ask for, what is seen, by which group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from obsdiff.embedded.emoji import emoji_of_prompt, load_emoji
from obsdiff.embedded.emoji_encoder import emoji_features, ranked_emoji
from obsdiff.errors import UserError


def wanted_emoji(prompts: Sequence[str]) -> Tensor:
    """The emoji each prompt asks for, by its place in the atlas, int64 (n,).

    Raises:
        UserError: A prompt asks for none, or for several.
    """
    wanted = []
    for prompt in prompts:
        place = emoji_of_prompt(prompt)
        if place is None:
            raise UserError(
                f"cannot measure alignment: prompt {prompt!r} names no emoji (such as red apple), or several; name "
                "other evaluation prompts"
            )
        wanted.append(place)
    return torch.tensor(wanted)


def read_emoji(images: Tensor) -> Tensor:
    """The emoji seen in each of the images (n, c, h, w) in [0, 1], int64 (n,)."""
    return ranked_emoji(images, 1)[:, 0]


@cache
def atlas_features() -> Tensor:
    """The encoder's features (n, 128) of all pictures of the atlas."""
    return emoji_features((load_emoji().images() + 1) / 2)


def group_of_emoji() -> tuple[str, ...]:
    """Unicode's group of each emoji of the atlas."""
    return load_emoji().groups
