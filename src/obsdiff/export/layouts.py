"""Images as other programs want to find them: plain, for GenEval (2310.11513) or for DPG-Bench (2403.05135)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.evaluation.sampling import save_images
from obsdiff.evaluation.scorers import METADATA
from obsdiff.files import write_json, write_text

INDEX = "images.json"
DPG_SIDE = 2  # images of a prompt lie in a square of so many


def by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    """The places of each prompt, in the order in which prompts first come."""
    found: dict[str, list[int]] = {}
    for at, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(at)
    return found


def check_layout(layout: str, prompts: Sequence[str], source: str | None) -> Mapping[str, Mapping[str, Any]]:
    """What a layout needs to know of each prompt, before anything is drawn.

    Args:
        layout: plain, geneval or dpg.
        prompts: One per image.
        source: The prompt file: GenEval's ``evaluation_metadata.jsonl``, DPG-Bench's ``dpg_bench.csv``.

    Raises:
        UserError: The layout is unknown, or the file does not hold what it needs.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    records: dict[str, Mapping[str, Any]] = {}
    if layout == "geneval" and source is not None and source.endswith(".jsonl"):
        records = {record["prompt"].strip(): record for record in _records(Path(source))}
    if layout == "dpg" and source is not None and source.endswith(".csv"):
        with open(source, encoding="utf-8-sig", newline="") as file:
            records = {(row.get("text") or "").strip(): row for row in csv.DictReader(file)}
    if layout == "plain":
        return {prompt: {} for prompt in prompts}
    needed = {"geneval": "prompt", "dpg": "item_id"}[layout]
    if missing := [prompt for prompt in prompts if needed not in records.get(prompt, {})]:
        wanted = {"geneval": "evaluation_metadata.jsonl of GenEval", "dpg": "dpg_bench.csv of DPG-Bench"}[layout]
        raise UserError(
            f"layout {layout} needs --evaluation.prompts to name the {wanted}; it says nothing of {missing[0]!r}"
        )
    if layout == "dpg" and any(len(places) != DPG_SIDE**2 for places in by_prompt(prompts).values()):
        raise UserError(
            f"layout dpg needs {DPG_SIDE**2} images of each prompt: evaluation.num_images = "
            f"{DPG_SIDE**2} x the number of prompts"
        )
    return records


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that have a prompt; other lines are named where the prompts are read."""
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("prompt"), str):
                yield record


def write_images(
    folder: Path,
    layout: str,
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write images (n, c, h, w) in [0, 1] into an empty folder, and ``images.json``: their prompts and seeds.

    Args:
        folder: An empty one.
        layout: As :func:`check_layout` was told.
        images: One per prompt.
        prompts, seeds: One per image.
        records: What :func:`check_layout` gave.
    """
    LAYOUTS[layout](folder, images.nan_to_num().clamp(0, 1), prompts, records)
    write_json(folder / INDEX, {"layout": layout, "prompts": list(prompts), "seeds": list(seeds)})


def _plain(folder: Path, images: Tensor, prompts: Sequence[str], _: Mapping[str, Mapping[str, Any]]) -> None:
    files = [folder / f"{at:05d}.png" for at in range(len(images))]
    save_images(images, files)
    rows = [{"file_name": file.name, "prompt": prompt} for file, prompt in zip(files, prompts, strict=True)]
    write_text(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows))


def _geneval(folder: Path, images: Tensor, prompts: Sequence[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    """``00000/metadata.jsonl`` with the prompt's record, ``00000/samples/0000.png`` and so on."""
    for at, (prompt, places) in enumerate(by_prompt(prompts).items()):
        own = folder / f"{at:05d}"
        (own / "samples").mkdir(parents=True)
        write_text(own / METADATA, json.dumps(records[prompt]) + "\n")
        save_images(images[places], [own / "samples" / f"{n:04d}.png" for n in range(len(places))])


def _dpg(folder: Path, images: Tensor, prompts: Sequence[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    """``ITEM_ID.png`` with the four images of a prompt in a square."""
    from torchvision.utils import make_grid

    for prompt, places in by_prompt(prompts).items():
        square = make_grid(images[places], nrow=DPG_SIDE, padding=0)
        save_images(square[None], [folder / f"{records[prompt]['item_id']}.png"])


LAYOUTS = {"plain": _plain, "geneval": _geneval, "dpg": _dpg}
