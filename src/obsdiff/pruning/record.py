"""Recording the dense pipeline's own sampling trajectories: what to distil on without images and without a teacher."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff.errors import MALFORMED, UserError
from obsdiff.files import check_folder, check_writable, read_json, remove_folder, whole_folder, write_json
from obsdiff.models.conditioning import ENCODE_BATCH, Conditioning, check_prompts, encode_prompts
from obsdiff.models.content import DECODING, component_hashes, model_hash
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import NEGATIVE
from obsdiff.models.subject import Subject, subject_of
from obsdiff.numbers import check_seed, check_whole
from obsdiff.paths import unfinished_recording
from obsdiff.progress import track
from obsdiff.pruning.columns import Column, write_columns
from obsdiff.pruning.kept import KeptParts, check_kept
from obsdiff.pruning.recorder import Recorder
from obsdiff.pruning.statistics import check_fingerprint
from obsdiff.pruning.trajectories import check_call, noise_seeds, run_trajectories, seen_calls
from obsdiff.ranks import own_share, rank, wait_for_all, world_size

INDEX, TENSORS = "trajectories.json", "trajectories.safetensors"
SHARDS = "shards.json"  # the index of what is not finished
EMBEDS = "embeds."  # before the names of what prompts are told
ROWS = ("latents", "answers", f"{NEGATIVE}answers", EMBEDS)  # have a row for each prompt
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
        processes: That recorded it, or waited for it.
        time_s: Seconds it took; what earlier runs had drawn of it is added as if shared by these processes.
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

    Each batch is written as it is drawn, to a hidden folder beside ``folder`` that goes once the recording is there, so
    that memory holds one, and a run that was killed goes on with those that are missing, to the same bits. Of several
    processes all call this, and each draws its share.

    Args:
        pipe: The dense pipeline.
        prompts: The prompts.
        folder: Receives ``trajectories.json`` and ``trajectories.safetensors``, whole or not at all.
        steps, guidance_scale: None takes the pipeline's own default.
        seed: Noise seed; each prompt draws from a seed of its own.
        batch_size: Prompts per pipeline call; changes speed and memory only.
        quiet: No progress bar.

    Raises:
        UserError: A setting is out of range, the place is taken or cannot be written, or what the denoiser is told
            cannot be kept.
    """
    started = time.perf_counter()
    call = call_arguments(pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    check_prompts(prompts)
    check_call(call)
    check_seed("seed", seed)
    check_whole("batch_size", batch_size, 1)
    check_folder(folder, INDEX, "a recording of trajectories", replace=True)
    check_writable(folder)
    work = unfinished_recording(folder)
    check_kept(work, SHARDS, "an unfinished recording of trajectories")
    subject, seeds = subject_of(pipe), noise_seeds(seed, len(prompts))
    starts = range(0, len(prompts), batch_size)
    batches = {f"prompts from {start}": slice(start, min(start + batch_size, len(prompts))) for start in starts}
    told = _Encoded(pipe, prompts, call)
    told(slice(0, 1))  # prompts that cannot be encoded are refused before anything is written
    request = recording_request(pipe, prompts, steps, guidance_scale, seed)
    key = hashlib.sha256(json.dumps([FORMAT, request, batch_size], sort_keys=True).encode()).hexdigest()
    shards = KeptParts(work, SHARDS, key, list(batches))
    before = sum(float(shards.read(name)[0]["time_s"]) for name in batches if name in shards)
    missing = [name for name in batches if name not in shards]
    mine = missing[own_share(len(missing))]
    for name in track(mine, len(mine), "recording trajectories", quiet or rank() > 0):
        begun, part = time.perf_counter(), batches[name]
        tensors, said = _drawn(subject, told(part), seeds[part], call)
        shards.write(name, tensors, said | {"time_s": str(time.perf_counter() - begun)}, own=True)
        del tensors
    wait_for_all()
    if rank() == 0:
        shards.look_again()
        if lost := [name for name in batches if name not in shards]:
            raise UserError(f"{work} has lost {len(lost)} of its shards to another run; record in one run at a time")
        last = shards.read(list(batches)[-1])[0]
        spent = time.perf_counter() - started + before / world_size()
        index: dict[str, Any] = {"format": FORMAT, "request": request, "model": model_hash(subject.denoiser)}
        index |= {"common": json.loads(last["common"]), "rows": int(last["rows"])}
        with whole_folder(folder, INDEX, replace=True) as temporary:
            write_columns(temporary / TENSORS, _joined(lambda: (shards.read(name)[1] for name in batches)))
            write_json(temporary / INDEX, index | {"processes": world_size(), "time_s": spent})
        remove_shards(folder)
    wait_for_all()


def remove_shards(folder: Path) -> None:
    """Remove what was kept on the way to a recording that is finished now."""
    remove_folder(unfinished_recording(folder), SHARDS)


class _Encoded:
    """Prompts that are encoded as they are needed, in the same batches as all of them would be: to the same bits."""

    def __init__(self, pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        self._pipe, self._prompts, self._call = pipe, prompts, call
        self._known: tuple[slice, Conditioning] | None = None

    def __call__(self, part: slice) -> Conditioning:
        first = part.start // ENCODE_BATCH * ENCODE_BATCH
        around = slice(first, -(-part.stop // ENCODE_BATCH) * ENCODE_BATCH)
        if self._known is None or self._known[0] != around:
            self._known = None
            self._known = around, encode_prompts(self._pipe, self._prompts[around], self._call)
        return self._known[1][part.start - first : part.stop - first]


def _drawn(
    subject: Subject, conditioning: Conditioning, seeds: Sequence[int], call: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of one batch of prompts the tensors of a recording, and what else is to be known."""
    recorder = Recorder(subject, conditioning)
    with eval_mode(subject.pipe), seen_calls(subject, recorder.see, recorder.hear):
        for _ in run_trajectories(subject, conditioning, seeds, len(conditioning), call, recorder.begin):
            pass
    seen, heard = recorder.seen, recorder.heard
    tensors = {"latents": torch.stack([x for x, _, _ in seen], dim=1), "times": torch.cat([at for _, at, _ in seen])}
    for kind in ("", NEGATIVE):
        if all(kind in answer for answer in heard):
            tensors[f"{kind}answers"] = torch.stack([answer[kind] for answer in heard], dim=1)
    if len(subject.components) > 1:
        tensors["denoisers"] = torch.tensor([number for _, _, number in seen])
    for name, tensor in recorder.embeds().items():
        tensors[EMBEDS + name] = _once(tensor) if name.startswith(NEGATIVE) else tensor
    common = _described(recorder.common, "common", tensors)
    return tensors, {"common": json.dumps(common), "rows": str(recorder.rows_each)}


def _joined(shards: Callable[[], Iterator[Mapping[str, Tensor]]]) -> dict[str, Column]:
    """The tensors of a whole recording: rows of all shards; what has no rows is that of the last one.

    Raises:
        UserError: Shards do not fit together.
    """
    kinds: dict[str, list[Tensor]] = {}  # shapes and dtypes alone
    for last in shards():
        for name, tensor in last.items():
            kinds.setdefault(name, []).append(tensor.to("meta"))
    count, columns = sum(map(len, kinds["latents"])), {}
    for name, found in kinds.items():
        if not name.startswith(ROWS):
            if name in last:
                columns[name] = Column(last[name].dtype, last[name].shape, partial(iter, (last[name],)))
            continue
        told, everywhere = name.startswith(EMBEDS), len(found) == len(kinds["latents"])
        if (told and not everywhere) or len({kind.shape[2 if told else 1 :] for kind in found}) > 1:
            raise UserError(f"{name} of some prompts is missing or of another shape; that cannot be kept in a file")
        if everywhere:  # else negative answers of a pipeline that did without guidance in some calls
            like = max(found, key=lambda kind: kind.shape[1:2])  # the longest
            dtype = reduce(torch.promote_types, (kind.dtype for kind in found))  # masks are bool where none is padded
            pieces = partial(_pieces, shards, name, like.to(dtype))
            first = next(pieces())[:1]
            one = name.startswith(EMBEDS + NEGATIVE) and all(torch.equal(x, first.expand_as(x)) for x in pieces())
            rows = Column(dtype, (count, *first.shape[1:]), pieces)
            columns[name] = Column(dtype, first.shape, partial(iter, (first,))) if one else rows
    return columns


def _pieces(shards: Callable[[], Iterator[Mapping[str, Tensor]]], name: str, like: Tensor) -> Iterator[Tensor]:
    """The rows of each shard; ragged ones are padded to the longest."""
    for tensors in shards():
        found = tensors[name].to(like.dtype).expand(len(tensors["latents"]), *tensors[name].shape[1:])
        short = like.shape[1] - found.shape[1] if found.dim() > 1 else 0
        yield nn.functional.pad(found, (0, 0) * (found.dim() - 2) + (0, short)) if short else found


def _once(rows: Tensor) -> Tensor:
    """The first row, if all are equal."""
    return rows[:1] if all(torch.equal(row, rows[0]) for row in rows) else rows


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
    """Open a recording; its tensors are mapped, so that memory takes what is looked at.

    Raises:
        UserError: There is none, it is damaged, or of an earlier version.
    """
    index = read_json(folder / INDEX, "a recording of trajectories")
    if isinstance(index, dict) and index.get("format") != FORMAT:
        raise UserError(f"{folder} was recorded by an earlier version, without answers; delete it and record again")
    try:
        tensors = load_file(folder / TENSORS)
        count = len(tensors["latents"])
        embeds = {name: rows.expand(count, *rows.shape[1:]) for name, rows in _named(tensors, EMBEDS).items()}
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
