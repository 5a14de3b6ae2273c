"""The one convention by which training and recording call a denoiser: latents, times, conditions by its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.calls import record_call, remembered_call
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.denoisers import Denoisers, denoisers_of, dtype_of
from obsdiff.models.families import Family, find_family
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import NEGATIVE, CallRows, Path, flattened, nested, row_paths, take_rows

# of ragged conditions their lengths; the number of the denoiser that is asked; what a list holds for each row
LENGTHS, WHICH, EACH = "@lengths", "@denoiser", "@each"


def call_denoiser(
    denoiser: nn.Module,
    latents: Tensor,
    times: Tensor,
    conditions: Mapping[str, Tensor],
    common: Mapping[str, Any] | None = None,
) -> Tensor:
    """The denoiser's answer to noisy ``latents`` (n, ...) at ``times`` (n,).

    It is given everything in its own dtype but the times, which half precision would round to steps of 2 to 4.

    Args:
        denoiser: The model; of two, each is asked about the rows that ``conditions`` send to it.
        latents, times: As the pipeline gives them.
        conditions: What each row is told, by argument (:func:`split_call`).
        common: What all rows are told.
    """
    if isinstance(denoiser, Denoisers):
        return _call_both(denoiser, latents, times, conditions, common)
    family, dtype = find_family(denoiser), dtype_of(denoiser)
    given: dict[Path, Any] = {
        tuple(name.removesuffix(EACH).split(".")): [value] * len(latents) if name.endswith(EACH) else value
        for name, value in (common or {}).items()
    }
    for name, value in conditions.items():
        if not name.endswith((LENGTHS, WHICH)):
            told: Any = value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
            if (lengths := conditions.get(name + LENGTHS)) is not None:
                told = [row[:length] for row, length in zip(told, lengths.tolist(), strict=True)]
            given[tuple(name.split("."))] = told
    sample = latents.to(dtype)
    told_latents = list(sample.unbind()) if family.listed else sample
    answer = denoiser(**{family.sample: told_latents, family.time: times}, **nested(given), return_dict=False)[0]
    return torch.stack(answer) if isinstance(answer, list) else answer


def _call_both(
    denoiser: nn.Module,
    latents: Tensor,
    times: Tensor,
    conditions: Mapping[str, Tensor],
    common: Mapping[str, Any] | None,
) -> Tensor:
    answers, places = [], []
    for number, model in enumerate(denoiser.children()):
        rows = (conditions[WHICH] == number).nonzero().flatten().to(latents.device)
        if len(rows):
            own = {name: value[rows.to(value.device)] for name, value in conditions.items()}
            answers.append(call_denoiser(model, latents[rows], times[rows], own, common))
            places.append(rows)
    return torch.cat(answers)[torch.cat(places).argsort()]


def split_call(
    rows: CallRows, given: Mapping[str, Any], paths: frozenset[Path]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of a call without latents and time: what each prompt is told, and what all rows share.

    Conditions have one row per prompt, by argument (dotted inside dictionaries); those of the negative prompt too, with
    "negative_" before the name. Ragged ones (lists of tensors) are padded, with their lengths beside them.

    Args:
        rows: Which has just looked at the call.
        given: The call's arguments.
        paths: Those with an entry per row (:func:`obsdiff.models.rows.row_paths`).
    """
    family = rows.family
    conditions: dict[str, Tensor] = {}
    common: dict[str, Any] = {}
    own = list(range(rows.own.start, rows.own.stop))
    other = [row for row in range(rows.each * rows.prompts) if row not in set(own)]
    for path, value in flattened(given).items():
        name = ".".join(path)
        if name == family.mask and value is None:  # none of these prompts is padded, others may be
            value = torch.ones(given[family.embeds].shape[:2], dtype=torch.bool)
        if path[0] in (family.sample, family.time, "return_dict") or value is None:
            continue
        if path not in paths:
            common[name] = value
            continue
        if isinstance(value, list) and not isinstance(value[0], Tensor):
            if any(row != value[0] for row in value):
                raise UserError(f"{rows.kind} tells its denoiser a different {name} for each row; that cannot be kept")
            common[name + EACH] = value[0]
            continue
        for prefix, at in (("", own), (NEGATIVE, other)):
            if at:
                conditions |= _packed(prefix + name, value, at)
    return conditions, common


def _packed(name: str, value: Any, at: list[int]) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value[at].cpu()}
    chosen = [value[i] for i in at]
    return {
        name: nn.utils.rnn.pad_sequence([row.cpu() for row in chosen], batch_first=True),
        name + LENGTHS: torch.tensor([len(row) for row in chosen]),
    }


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several batches as one tensor; ragged ones are padded to the longest."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    return nn.utils.rnn.pad_sequence([row for part in parts for row in part], batch_first=True)


def paths_of(pipe: Any, conditioning: Conditioning | None = None) -> frozenset[Path]:
    """The denoiser's arguments that have an entry for each row of a call."""
    call = next(iter(remembered_call(pipe, conditioning=conditioning).values()))
    return row_paths(call, len(call[find_family(*denoisers_of(pipe).values()).sample]))


def one_image(pipe: Any, call: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of a call of each denoiser with one image, without guidance, at the size that ``call`` says."""
    family, paths = find_family(*denoisers_of(pipe).values()), paths_of(pipe)
    found = {}
    for name, arguments in remembered_call(pipe, call).items():
        rows = CallRows(pipe, family, Conditioning({}, count=1))
        rows.begin(slice(0, 1))
        rows.look(denoisers_of(pipe)[name], (), arguments)
        found[name] = take_rows(arguments, paths, [rows.own.start])
    return found


@contextmanager
def default_dtype(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """What tensors are made in that name no dtype; Lightning changes it where everything is trained in another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def drawing(pipe: Any) -> Iterator[None]:
    """Let a pipeline draw whose denoiser is in training: without dropout and autocast, and though the denoiser is in
    another dtype than the pipeline's other parts (it is then given its own and answers in theirs)."""
    models = list(denoisers_of(pipe).values())
    family, dtype = find_family(*models), dtype_of(models[0])

    def cast(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inner = {k: v if k == family.time else _as(v, dtype) for k, v in given.items()}
        return tuple(_as(value, dtype) for value in args), inner

    def back(_: nn.Module, __: Any, answer: Any) -> Any:
        if isinstance(answer, tuple):
            return tuple(_as(value, outer) for value in answer)
        for key, value in answer.items():
            answer[key] = _as(value, outer)
        return answer

    others = [m for m in vars(pipe).values() if isinstance(m, nn.Module) and m not in models]
    outer = next((dtype_of(m) for m in others), dtype)
    hooks: list[Any] = []
    for model in models if dtype != outer else ():
        hooks += [model.register_forward_pre_hook(cast, with_kwargs=True), model.register_forward_hook(back)]
    try:
        with eval_mode(pipe), torch.autocast(pipe.device.type, enabled=False), default_dtype(), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def drop_prompts(embeds: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Embeds with those of the negative prompt where ``dropped`` (bool (n,)), for classifier-free guidance."""
    found = {}
    for name, tensor in embeds.items():
        if not name.startswith(NEGATIVE):
            negative = embeds.get(NEGATIVE + name)
            chosen = dropped.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)
            found[name] = tensor if negative is None else torch.where(chosen, _like(negative, tensor), tensor)
    return found


def both_prompts(embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Twice as many rows: all with the embeds of the negative prompt, then all with their own; what the negative prompt
    does not change is the same in both."""
    found = {}
    for name, tensor in embeds.items():
        if not name.startswith(NEGATIVE):
            negative = embeds.get(NEGATIVE + name, tensor)
            found[name] = torch.cat([_like(negative, tensor), tensor])
    return found


def _like(negative: Tensor, tensor: Tensor) -> Tensor:
    """Ragged rows of the negative prompt, padded or cut to the length of the others."""
    if negative.shape == tensor.shape:
        return negative
    rows = torch.zeros_like(tensor)
    length = min(negative.shape[1], tensor.shape[1])
    rows[:, :length] = negative[:, :length]
    return rows


class PromptEncoder:
    """Prompts to what the denoiser is told, through the pipeline's frozen text encoders; each distinct prompt is
    encoded once.

    Attributes:
        common: What the denoiser is told in all rows of a call; there after the first prompt.
        latents: The shape of an image's latents in that call.
    """

    def __init__(self, pipe: Any, keep: int = 4096) -> None:
        self.pipe = pipe
        self.keep = keep
        self.common: dict[str, Any] = {}
        self.latents: tuple[int, ...] = ()
        self._known: dict[str, dict[str, Tensor]] = {}
        self._size: tuple[int, int] | None = None

    def __call__(self, prompts: list[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Conditions of ``prompts`` (:func:`split_call`), on the CPU.

        Args:
            prompts: The prompts.
            size: Height and width in pixels of the images that they go with; None: the pipeline's own.
        """
        if len(self._known) + len(set(prompts)) > self.keep or size != self._size:
            self._known.clear()
            self._size = size
        for prompt in set(prompts) - self._known.keys():
            # one at a time: in a batch the last bit would depend on which others are new, unlike in a resumed run
            conditioning = encode_prompts(self.pipe, [prompt], call_arguments(self.pipe))
            found, self.common, self.latents = conditions_of(self.pipe, conditioning, size)
            self._known[prompt] = {name: tensor[0] for name, tensor in found.items()}
        names = self._known[prompts[0]]
        return {name: stacked([self._known[prompt][name][None] for prompt in prompts]) for name in names}


def conditions_of(
    pipe: Any, conditioning: Conditioning, size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, ...]]:
    """What a pipeline tells its denoiser of one prompt, and of all, and the shape of its latents: its call is recorded.

    Args:
        pipe: The pipeline.
        conditioning: The prompt.
        size: Height and width in pixels of the single image; None: what the pipeline draws by itself.
    """
    components = denoisers_of(pipe)
    family: Family = find_family(*components.values())
    call = call_arguments(pipe)
    if size is not None:
        accepted = inspect.signature(type(pipe).__call__).parameters
        wanted = {"height": size[0], "width": size[1], "num_frames": 1, "use_resolution_binning": False}
        call |= {key: value for key, value in wanted.items() if key in accepted}
    found = record_call(pipe, family, components, conditioning, call)
    given = next(iter(found.values()))
    rows = CallRows(pipe, family, conditioning)
    rows.begin(slice(0, len(conditioning)))
    rows.look(next(iter(components.values())), (), given)
    conditions, common = split_call(rows, given, row_paths(given, rows.each * rows.prompts))
    return conditions, common, tuple(given[family.sample][0].shape)
