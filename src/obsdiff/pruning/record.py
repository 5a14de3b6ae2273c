"""Recording the dense pipeline's own sampling trajectories: what to distil on without images and without a teacher."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from obsdiff.errors import MALFORMED, UserError
from obsdiff.files import check_folder, check_writable, read_json, whole_folder, write_json
from obsdiff.models.calling import paths_of, split_call, stacked
from obsdiff.models.conditioning import Conditioning, check_prompts, encode_prompts
from obsdiff.models.content import DECODING, component_hashes, model_hash
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import NEGATIVE, CallRows
from obsdiff.models.subject import Subject, subject_of
from obsdiff.numbers import check_seed, check_whole
from obsdiff.progress import track
from obsdiff.pruning.statistics import check_fingerprint
from obsdiff.pruning.trajectories import check_call, noise_seeds, run_trajectories, seen_calls
from obsdiff.ranks import world_size

INDEX, TENSORS = "trajectories.json", "trajectories.safetensors"
FORMAT = 2  # 1: without answers
TENSOR, TUPLE = "@tensor", "@tuple"  # how what JSON does not have is written


@dataclass(frozen=True)
class Trajectories:
    """What was recorded.

    Attributes:
        latents: What the denoiser saw, (prompts, calls, ...).
        times: The time it was told at each call, (calls,), or (calls, tokens) where each token has its own.
        embeds: What the denoiser is told of every prompt, by its own argument, negative prompts' included
            (:func:`obsdiff.models.calling.split_call`), (prompts, ...).
        common: What it is told in all rows.
        denoisers: The number of the denoiser that was asked at each call, (calls,); None if there is one.
        answers: What it answered to the prompts themselves, (prompts, calls, ...).
        negative_answers: To the negative prompts, as large; None where it was not asked about them in every call.
        request: What they were recorded for.
        model: Hash of the denoiser.
        rows: Rows per prompt in each of the denoiser's calls: 2 with guidance.
        processes: That waited for it.
        time_s: Seconds it took.
    """

    latents: Tensor
    times: Tensor
    embeds: dict[str, Tensor]
    common: dict[str, Any]
    denoisers: Tensor | None
    answers: Tensor
    negative_answers: Tensor | None
    request: dict[str, Any]
    model: str
    rows: int
    processes: int
    time_s: float

    @property
    def content(self) -> dict[str, str]:
        """Hashes of the components of the pipeline that drew them."""
        return dict(self.request.get("components", {}))


def recording_request(
    pipe: Any, prompts: Sequence[str], steps: int | None, guidance_scale: float | None, seed: int
) -> dict[str, Any]:
    """What a recording depends on, JSON-able: the content of all that stands upstream of latents, never a name.

    Args:
        pipe: The dense pipeline.
        prompts, steps, guidance_scale, seed: As for :func:`record_trajectories`.
    """
    call = call_arguments(pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    return {
        "components": component_hashes(pipe, DECODING),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "call": call,
        "seed": seed,
    }


class Recorder:
    """What the denoiser is given as the pipeline runs, and what it answers, call by call.

    Attributes:
        seen: Of the batch that runs: latents (rows, ...) on the CPU, the time it was told, and the number of the
            denoiser, of each call.
        heard: The answers (rows, ...) on the CPU to each call: "" of the prompts themselves, "negative_" of the others.
        common: What it is told in all rows.
        rows_each: Rows per prompt in each call.
    """

    def __init__(self, subject: Subject, conditioning: Conditioning) -> None:
        self.family = subject.family
        self.seen: list[tuple[Tensor, Tensor, int]] = []
        self.heard: list[dict[str, Tensor]] = []
        self.common: dict[str, Any] = {}
        self.rows_each = 1
        self._told: list[dict[str, Tensor]] = []
        self._paths = paths_of(subject.pipe, conditioning)
        self._rows = CallRows(subject.pipe, subject.family, conditioning)
        self._numbers = {id(model): number for number, model in enumerate(subject.components.values())}

    def begin(self, part: slice) -> None:
        """A new batch of prompts comes."""
        self.seen.clear()
        self.heard.clear()
        self._rows.begin(part)

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called."""
        rows, family = self._rows, self.family
        given = rows.look(model, args, kwargs)
        if rows.repeated:  # the negative prompt's own call, or skip-layer guidance: the same latents again
            if len(self.seen) == 1 and family.guidance == "calls":
                negative, _ = split_call(rows, given, self._paths)
                self._told[-1] |= {NEGATIVE + name: tensor for name, tensor in negative.items()}
            return
        if not self.seen:
            found, self.common = split_call(rows, given, self._paths)
            self._told.append(found)
            self.rows_each = rows.each
        time = torch.as_tensor(given[family.time])
        sample = given[family.sample]
        own = torch.stack(sample[rows.own]) if family.listed else sample[rows.own]
        one = time[:1] if time.dim() > 1 else time.reshape(-1)[:1]  # a time for each token, or for each row
        self.seen.append((own.cpu(), one.float().cpu(), self._numbers[id(model)]))

    def hear(self, model: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        """The denoiser has answered the call that was seen last."""
        rows, found = self._rows, answer[0]
        if isinstance(found, list):
            found = torch.stack(found)
        if rows.repeated:
            if self.family.guidance == "calls":
                self.heard[-1].setdefault(NEGATIVE, _kept(found))
            return
        self.heard.append({"": _kept(found[rows.own])})
        if rows.each == 2:
            self.heard[-1][NEGATIVE] = _kept(found[rows.negative])

    def embeds(self) -> dict[str, Tensor]:
        """What the denoiser is told of every prompt so far, by its own argument (prompts, ...)."""
        return {name: stacked([part[name] for part in self._told]) for name in self._told[0]}


@torch.no_grad()
def record_trajectories(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 4,
    quiet: bool = True,
) -> None:
    """Denoise every prompt with the pipeline's own sampler and keep what its denoiser was given and answered each time.

    Args:
        pipe: The dense pipeline.
        prompts: The prompts.
        folder: Receives ``trajectories.json`` and ``trajectories.safetensors``, whole or not at all.
        steps, guidance_scale: None takes the pipeline's own default.
        seed: Noise seed; each prompt draws from a seed of its own.
        batch_size: Prompts per pipeline call; changes speed and memory only.
        quiet: No progress bar.
    """
    started = time.perf_counter()
    call = call_arguments(pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    check_prompts(prompts)
    check_call(call)
    check_seed("seed", seed)
    check_whole("batch_size", batch_size, 1)
    check_folder(folder, INDEX, "a recording of trajectories", replace=True)
    check_writable(folder)
    subject = subject_of(pipe)
    conditioning = encode_prompts(pipe, prompts, call)
    recorder = Recorder(subject, conditioning)
    latents: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {"": [], NEGATIVE: []}
    times, which = torch.empty(0), torch.empty(0)
    seeds = noise_seeds(seed, len(prompts))
    with eval_mode(pipe), seen_calls(subject, recorder.see, recorder.hear):
        batches = run_trajectories(subject, conditioning, seeds, batch_size, call, recorder.begin)
        for _ in track(batches, -(-len(prompts) // batch_size), "recording trajectories", quiet):
            latents.append(torch.stack([sample for sample, _, _ in recorder.seen], dim=1))
            for kind, parts in answers.items():
                if all(kind in call for call in recorder.heard):
                    parts.append(torch.stack([call[kind] for call in recorder.heard], dim=1))
            times = torch.cat([at for _, at, _ in recorder.seen])
            which = torch.tensor([number for _, _, number in recorder.seen])
    tensors = {"latents": torch.cat(latents), "times": times}
    tensors |= {f"{kind}answers": torch.cat(parts) for kind, parts in answers.items() if len(parts) == len(latents)}
    if len(subject.components) > 1:
        tensors["denoisers"] = which
    for name, tensor in recorder.embeds().items():
        tensors[f"embeds.{name}"] = _once(tensor) if name.startswith(NEGATIVE) else tensor
    described = _described(recorder.common, "common", tensors)
    with whole_folder(folder, INDEX, replace=True) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        request = recording_request(pipe, prompts, steps, guidance_scale, seed)
        spent = time.perf_counter() - started
        index: dict[str, Any] = {"format": FORMAT, "request": request, "model": model_hash(subject.denoiser)}
        index |= {"common": described, "rows": recorder.rows_each, "processes": world_size(), "time_s": spent}
        write_json(temporary / INDEX, index)


def _once(rows: Tensor) -> Tensor:
    """The first row, if all are equal."""
    return rows[:1] if all(torch.equal(row, rows[0]) for row in rows) else rows


def _kept(answer: Tensor) -> Tensor:
    """A copy: the pipeline may write into its own."""
    return answer.detach().to("cpu", copy=True)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of numbers, texts, lists, tuples and dictionaries; tensors inside go to ``tensors`` by their place."""
    if isinstance(value, Tensor):
        tensors[name] = value.cpu()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _described(inner, f"{name}.{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inside = [_described(inner, f"{name}.{i}", tensors) for i, inner in enumerate(value)]
        return inside if isinstance(value, list) else {TUPLE: inside}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"the denoiser is told a {type(value).__name__} ({name}), which cannot be kept in a file")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The opposite of :func:`_described`."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        if TUPLE in value:
            return tuple(_restored(inner, tensors) for inner in value[TUPLE])
        return {key: _restored(inner, tensors) for key, inner in value.items()}
    return [_restored(inner, tensors) for inner in value] if isinstance(value, list) else value


def check_recording(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a recording that was made of, or for, anything else than ``wanted`` (:func:`recording_request`).

    Raises:
        UserError: Naming what differs; or the recording is damaged.
    """
    check_fingerprint(open_trajectories(folder).request, wanted, folder, "trajectories")


def open_trajectories(folder: Path) -> Trajectories:
    """Read a recording.

    Raises:
        UserError: There is none, it is damaged, or of an earlier version.
    """
    index = read_json(folder / INDEX, "a recording of trajectories")
    if isinstance(index, dict) and index.get("format") != FORMAT:
        raise UserError(f"{folder} was recorded by an earlier version, without answers; delete it and record again")
    try:
        tensors = load_file(folder / TENSORS)
        count = len(tensors["latents"])
        embeds = {name: rows.expand(count, *rows.shape[1:]) for name, rows in _named(tensors, "embeds.").items()}
        return Trajectories(
            tensors["latents"],
            tensors["times"],
            embeds,
            dict(_restored(index["common"], tensors)),
            tensors.get("denoisers"),
            tensors["answers"],
            tensors.get(f"{NEGATIVE}answers"),
            dict(index["request"]),
            str(index["model"]),
            int(index["rows"]),
            int(index["processes"]),
            float(index["time_s"]),
        )
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise UserError(f"{folder} is damaged; delete it and record again") from error
