"""Statistics of layer inputs, collected by hooks while the real pipeline runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import device_of
from obsdiff.models.families.base import TEXT
from obsdiff.models.graph import Graph, Site
from obsdiff.models.rows import CallRows
from obsdiff.models.subject import Subject
from obsdiff.obs.hessian import activation_matrices, weight_matrices
from obsdiff.obs.observers import OBSERVERS, exact
from obsdiff.obs.precision import SWITCHES, products_in
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.trajectories import CallCounter


class Collector:
    """Adds layer inputs to the statistics as the denoiser runs."""

    def __init__(
        self,
        statistics: Statistics,
        settings: Settings,
        counter: CallCounter,
        rows: CallRows,
        device: torch.device,
    ) -> None:
        self.statistics = statistics
        self.rows = rows
        self.settings = settings
        self.counter = counter
        self.device = device
        self.told_mask: Tensor | None = None
        self.forward_s = 0.0
        self._marks: list[Any] = []  # of the call that runs: its begin, then that and the end of each hook
        self._choices: dict[tuple[tuple[str, ...], int, int], Tensor | None] = {}

    def begin(self, conditioning: Conditioning, seeds: Sequence[int], part: slice) -> None:
        """A new batch of trajectories comes."""
        self.counter.restart()
        self.rows.begin(part)
        self.seeds = seeds[part]
        self.text_mask = None
        if conditioning.text_mask is not None and conditioning.negative_text_mask is not None:
            wanted = conditioning.text_mask[part]
            both = [conditioning.negative_text_mask.expand_as(wanted), wanted]
            self.text_mask = torch.cat(both[::-1] if self.rows.family.guidance == "last" else both)

    def enter_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called."""
        given = self.rows.look(denoiser, args, kwargs)
        told = None if self.rows.family.mask is None else given.get(self.rows.family.mask)
        self.told_mask = told.bool().cpu() if isinstance(told, Tensor) and told.dim() == 2 else None
        steps = self.counter.total
        self.weight = timestep_weights(self.settings.weighting, steps)[self.counter.index]
        self._choices.clear()
        self._marks = [self._mark()]

    def leave_call(self, *_: object) -> None:
        """The denoiser has answered."""
        marks = [*self._marks, self._mark()]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once for all that the call and its hooks have launched
        self.forward_s += sum(_seconds(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True))

    def see(self, site: Site, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A layer is about to read its input."""
        self._marks.append(self._mark())
        x = inputs[0].detach()
        if x.dim() == 3 and (chosen := self._chosen(site.tokens, x)) is not None:
            x = x.flatten(0, 1)[chosen]
        self.statistics.sites[site.name].add(activation_matrices(layer, x), self.weight)
        self._marks.append(self._mark())

    def _chosen(self, tokens: tuple[str, ...], x: Tensor) -> Tensor | None:
        """Which of all sequences' tokens in x (sequences, tokens, n) count in this call, int64; None if all do."""
        key = (tokens, len(x), x.shape[1])
        if key not in self._choices:
            mask = self._choose(*key)
            # places, found where the mask is: a device would have to say first how many there are
            self._choices[key] = None if mask is None else mask.flatten().nonzero().squeeze(1).to(x.device)
        return self._choices[key]

    def _choose(self, tokens: tuple[str, ...], sequences: int, length: int) -> Tensor | None:
        """Bool (sequences, length) on the CPU."""
        mask, text = None, TEXT in tokens
        padding = self._padding(sequences) if text else None
        if padding is not None and self.told_mask is not None and padding.shape[1] >= length:
            mask = padding[:, :length]  # what the denoiser is told may go on over the image
        elif padding is not None:
            others = length - padding.shape[1]
            if others < 0 or (others == 0) != (tokens == (TEXT,)):
                raise UserError(
                    f"the denoiser's text layers get {sequences} sequences of {length} tokens, the prompts' mask of "
                    f"padding is for {sequences} of {padding.shape[1]}; set max_sequence_length to what the text "
                    "encoders give, or encode the prompts without a mask"
                )
            image = padding.new_ones(sequences, others)
            mask = torch.cat([padding if part == TEXT else image for part in tokens], dim=1)
        if self.settings.tokens is None or self.settings.tokens >= length:
            return mask
        prompts = len(self.seeds)
        scores = torch.empty(sequences, length)
        for row in range(sequences):  # drawn per prompt and call, so the batch does not matter
            seed = (self.seeds[row % prompts] * 4096 + self.counter.calls) * 4 + 2 * (row >= prompts) + text
            scores[row] = torch.rand(length, generator=torch.Generator().manual_seed(seed % 2**63))
        if mask is not None:
            scores[~mask] = -1.0
        drawn = torch.zeros(sequences, length, dtype=torch.bool)
        drawn.scatter_(1, scores.topk(self.settings.tokens, dim=1).indices, True)
        return drawn if mask is None else drawn & mask

    def _padding(self, sequences: int) -> Tensor | None:
        """Bool (sequences, text tokens): the prompt tokens that are real, by what the denoiser is told or else by the
        tokenizers; None if it is not known."""
        if self.told_mask is not None:
            return self.told_mask if len(self.told_mask) == sequences else None
        if self.text_mask is None:
            return None
        if sequences != (expected := self.rows.each * len(self.seeds)):
            raise UserError(
                f"the denoiser's text layers get {sequences} sequences, the prompts' mask of padding is for {expected} "
                f"of {self.text_mask.shape[1]} tokens; encode the prompts without a mask"
            )
        return self.text_mask[-sequences:]  # without guidance there are no negative prompts, which come first

    def _mark(self) -> Any:
        """A point in time; on a CUDA device one of its own, which it passes when all launched before is done."""
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()


def _seconds(begin: Any, end: Any) -> float:
    """Between two marks that are passed."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


@contextmanager
def rounding_calls(graph: Graph, observer: str) -> Iterator[None]:
    """Products of the stages' linear layers in the precision of a calibration, too, where floats are rounded to it.

    Layers that read one vector a call stay in float32, and so does what is before the stages: ranks go by the least
    eigenvalues of what modulations read.

    Args:
        graph: Of the denoiser that is called.
        observer: A name of :data:`obsdiff.obs.observers.OBSERVERS`.
    """
    precision, device = OBSERVERS[observer].precision, device_of(graph.denoiser)
    stages = map(graph.layer, () if SWITCHES[precision] == "ieee" else graph.stages)
    inside = {id(m): m for stage in stages for m in stage.modules() if isinstance(m, nn.Linear)}
    running = ExitStack()  # of one layer

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].dim() > 2 and inputs[0].shape[-2] > 1:
            running.enter_context(products_in(precision, device))

    def leave(*_: object) -> None:
        running.close()

    handles = [layer.register_forward_pre_hook(enter) for layer in inside.values()]
    handles += [layer.register_forward_hook(leave) for layer in inside.values()]
    try:
        yield
    finally:
        running.close()  # torch calls no hooks after an interrupt
        for handle in handles:
            handle.remove()


@contextmanager
def collecting(
    subject: Subject,
    sites: Sequence[Site],
    conditioning: Conditioning,
    settings: Settings,
    statistics: Statistics,
    counter: CallCounter,
) -> Iterator[Collector]:
    """Hooks on the denoiser and on the first layer of each site, gone afterwards whatever happens."""
    graph = subject.graph
    device = device_of(subject.denoiser)
    for site in sites:  # an entry for each, so that one never reached is noticed
        groups, _, columns = weight_matrices(graph.layer(site.name)).shape
        # what reads one vector a call: few rows, and its ranks go by the least eigenvalues
        observer = exact(statistics.observer) if site in graph.vectors else statistics.observer
        statistics.sites.setdefault(site.name, OBSERVERS[observer].empty(columns, groups, device))
    rows = CallRows(subject.pipe, subject.family, conditioning)
    collector = Collector(statistics, settings, counter, rows, device)
    models = subject.components.values()
    handles = [model.register_forward_pre_hook(collector.enter_call, with_kwargs=True) for model in models]
    for site in sites:
        see: Callable[..., None] = partial(collector.see, site)
        handles.append(graph.layer(site.name).register_forward_pre_hook(see))
    handles += [model.register_forward_hook(collector.leave_call) for model in models]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()
