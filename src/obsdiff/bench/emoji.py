"""How well a pipeline draws emoji: ``python -m obsdiff.bench.emoji --pipeline emoji-sd3 --output measured.json``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.data.prompts import load_prompts
from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.emoji import load_emoji
from obsdiff.embedded.pictures import nearest_pictures, save_grid
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS
from obsdiff.evaluation.intervals import bootstrap_interval
from obsdiff.evaluation.sampling import sample
from obsdiff.files import check_writable, write_json
from obsdiff.models.info import call_arguments
from obsdiff.pruning.folder import load_pipeline
from obsdiff.versions import versions

SHOWN, COLUMNS = 64, 16  # pictures of the grid


def measure_emoji(pipe: Any, prompts: list[str], seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """What the pipeline draws for prompts that name emoji, one image each.

    Args:
        pipe: The pipeline.
        prompts: Each names one emoji.
        seed: The first noise seed; the others follow.

    Returns:
        Shares with 95 % bootstrap intervals: ``top1`` and ``top5`` by the embedded encoder, ``pixels_top1`` and
        ``pixels_top5`` by the nearest pictures of the atlas, all by group; ``frechet`` to the atlas; ``n``, ``seed``,
        ``call`` and ``time_s``. And the images (n, 3, h, w) in [0, 1].
    """
    started = time.perf_counter()
    reader, emoji = READERS["emoji"], load_emoji()
    images = sample(pipe, prompts, range(seed, seed + len(prompts)), batch_size=64, quiet=False)
    sampled_s = time.perf_counter() - started
    wanted = reader.wanted(prompts)
    nearest = nearest_pictures(images * 2 - 1, emoji.images(), 5) == wanted[:, None]
    near = reader.near_hits(images, prompts)
    assert near is not None  # this reader ranks
    hits = {
        "top1": reader.hits(images, prompts),
        "top5": near,
        "pixels_top1": nearest[:, 0].float(),
        "pixels_top5": nearest.any(1).float(),
    }
    groups = [emoji.groups[place] for place in wanted.tolist()]
    by_group: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups)):
        chosen = torch.tensor([name == group for name in groups])
        by_group[group] = {"n": int(chosen.sum()), **{key: float(hit[chosen].mean()) for key, hit in hits.items()}}
    measured = {
        **{key: {"share": float(hit.mean()), "interval": list(bootstrap_interval(hit))} for key, hit in hits.items()},
        "frechet": frechet_distance(reader.features(images), reader.real()),
        "groups": by_group,
        "n": len(prompts),
        "seed": seed,
        "call": call_arguments(pipe),
        "time_s": {"sampling": sampled_s},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return measured, images


def main(args: list[str] | None = None) -> None:
    """The command line; exit code 2 for anything the user can mend."""
    parser = argparse.ArgumentParser(description="Measure how well a pipeline draws emoji.")
    parser.add_argument("--pipeline", default="emoji-sd3", help="a name, folder or hub id (default: emoji-sd3)")
    parser.add_argument("--prompts", default="emoji-heldout", help="a prompt set (default: emoji-heldout)")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt (default: 0)")
    parser.add_argument("--num", type=int, help="how many prompts, in order (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="the first noise seed (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file that receives the figures")
    parser.add_argument("--grid", type=Path, help="PNG file of some samples, drawn over true")
    options = parser.parse_args(args)
    try:
        check_writable(options.output.parent)
        prompts = load_prompts(options.prompts)[options.first :][: options.num]
        measured, images = measure_emoji(load_pipeline(options.pipeline), prompts, options.seed + options.first)
        write_json(options.output, measured)
        if options.grid is not None:
            save_grid(_grid(images, prompts), options.grid, scale=3)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(", ".join(f"{key} {measured[key]['share']:.1%}" for key in ("top1", "top5", "pixels_top1", "pixels_top5")))


def _grid(images: Tensor, prompts: list[str]) -> list[Tensor]:
    """Rows of images (n, 3, h, w) in [0, 1], evenly chosen, each over the row of what their prompts ask for."""
    chosen = list(range(0, len(images), max(len(images) // SHOWN, 1)))[:SHOWN]
    drawn = images[chosen] * 2 - 1
    true = load_emoji().images()[READERS["emoji"].wanted([prompts[place] for place in chosen])]
    pairs = zip(drawn.split(COLUMNS), true.split(COLUMNS), strict=True)
    return [row for pair in pairs for row in pair]


if __name__ == "__main__":
    main()
