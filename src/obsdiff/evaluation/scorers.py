"""Scores by other programs, in environments of their own: ImageReward, for one, needs an old diffusers."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.evaluation.intervals import bootstrap_interval
from obsdiff.evaluation.measures.base import Figures
from obsdiff.evaluation.sampling import save_images
from obsdiff.names import MEASURES

METADATA = "metadata.jsonl"
TAKEN = (*MEASURES, "psnr", "recall", "alignment_top5", "not_finite")


def check_scorers(scorers: Mapping[str, str]) -> None:
    """Refuse programs that are not there, and names of other figures, before anything is drawn.

    Raises:
        UserError: Naming the first one.
    """
    for name, command in scorers.items():
        if name.partition("@")[0] in TAKEN or name.endswith(("_interval", "_groups", "_unguided")):
            raise UserError(f"a scorer cannot be called {name!r}, as another figure is; choose another name")
        try:
            program = shlex.split(command)[:1]
        except ValueError as error:
            raise UserError(f"scorer {name} ({command}) is no command: {error}") from error
        if not program or shutil.which(Path(program[0]).expanduser()) is None:
            raise UserError(f"scorer {name}: there is no program {' '.join(program) or repr(command)} to run")


def score(name: str, command: str, images: Tensor, prompts: Sequence[str]) -> Figures:
    """The mean score of images by a program, and its interval.

    The program is called with one more argument, a folder that holds the images as PNG and ``metadata.jsonl`` with
    ``file_name`` and ``prompt`` of each; the last line that it prints is a JSON list of one number per image.

    Args:
        name: What the figure is called.
        command: The program with its arguments, such as ``envs/reward/bin/python score.py``.
        images: (n, c, h, w) in [0, 1].
        prompts: One per image.

    Raises:
        UserError: It cannot be run, fails, or prints anything else.
    """
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as folder:
        files = [Path(folder) / f"{at:05d}.png" for at in range(len(images))]
        save_images(images.nan_to_num().clamp(0, 1), files)
        rows = [{"file_name": file.name, "prompt": prompt} for file, prompt in zip(files, prompts, strict=True)]
        (Path(folder) / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            program, *given = shlex.split(command)
            called = [str(Path(program).expanduser()), *given, folder]
            done = subprocess.run(called, capture_output=True, text=True, check=True)
            values = json.loads(done.stdout.strip().splitlines()[-1])
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"scorer {name} ({command}) gave no scores: {error}") from error
        except subprocess.CalledProcessError as error:
            last = " ".join(error.stderr.strip().splitlines()[-1:])[:300]
            raise UserError(f"scorer {name} ({command}) failed with {error.returncode}: {last}") from error
    good = isinstance(values, list) and len(values) == len(images)
    if not good or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(f"scorer {name} ({command}) must print a JSON list of {len(images)} numbers in its last line")
    scores = torch.tensor(values, dtype=torch.float64)
    return {name: float(scores.mean()), f"{name}_interval": list(bootstrap_interval(scores))}
