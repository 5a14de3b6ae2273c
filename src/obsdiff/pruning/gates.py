"""Learning EcoDiff's gates (2412.02852): which heads, neurons and channels the denoiser can do without.

Every unit's channels are multiplied by a hard-concrete gate (:mod:`obsdiff.criteria.ecodiff`) where the layers that
read them do, so that a gate at 0 is the unit's removal. The weights stay as they are; the λ of all gates of all modules
are trained together to minimise

    ``‖f(x; z) − f(x)‖² / ‖f(x)‖² + β_reg · mean over modules of the share of gates that are open, as expected``

where f is the denoiser's guided output ``n + g (p − n)``, as a sampler makes it.

The paper differentiates through whole trajectories, from the final latents back to the first, with every step computed
twice (its gradient checkpointing), which is 100 to 400 trajectories of forward and backward passes. Here a loss is of
one recorded call of the dense pipeline's trajectories instead: errors that a step makes are seen where they arise, and
not what later steps make of them. Published and kept: the distillation target is the dense model on the same input,
the gates start at λ = 3, AdamW of rate 0.1 takes 100 steps (100 prompts, 4 epochs, 4 accumulated), each accumulates
four draws of all gates, β_reg = 0.5.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.costs import BACKWARD
from obsdiff.criteria.ecodiff import hard_concrete, open_probability
from obsdiff.errors import UserError
from obsdiff.models.calling import WHICH, both_prompts, call_denoiser, drop_prompts
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import dtype_of
from obsdiff.models.graph import Graph, Group, Site
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import NEGATIVE
from obsdiff.models.subject import Subject
from obsdiff.progress import track
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.gradients import accumulated
from obsdiff.pruning.recorder import Recorder
from obsdiff.pruning.statistics import LearnedGates
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories, seen_calls
from obsdiff.ranks import world_size

STEPS = 100
DRAWS = 4  # of all gates in one step
CALLS = 4  # recorded calls that see one draw
START = 3.0
RATE = 0.1
PRESSURE = 0.5


def gated_groups(graph: Graph, sites: Sequence[Site]) -> list[Group]:
    """The groups whose units get gates: all whose consumers read one of these sites, but directions of vectors."""
    names = {site.name for site in sites}
    return [
        group
        for group in graph.groups
        if group.basis is None and any(graph.site_of[s.layer].name in names for s in group.consumers)
    ]


def check_gateable(subject: Subject, groups: Sequence[Group]) -> None:
    """Refuse what gates cannot be learned of, before anything runs.

    Raises:
        UserError: There are no units, several processes, or half precision.
    """
    if not groups:
        raise UserError("there are no heads, neurons or channels to learn gates of; use another method")
    if world_size() > 1:
        raise UserError("gates are learned by one process; run this without torchrun")
    for model in subject.components.values():
        if dtype_of(model) is torch.float16:
            raise UserError("gradients of gates vanish or overflow in float16; use --dtype float32 or bfloat16")


def learned_gates(
    subject: Subject, conditioning: Conditioning, settings: Settings, groups: Sequence[Group], quiet: bool = True
) -> LearnedGates:
    """Train the gates of all units of ``groups`` together.

    The same for every ``settings.batch_size`` (to rounding). Memory: the activations of that many calls (twice the
    rows with guidance), and the latents of the recorded calls.

    Args:
        subject: The dense pipeline; as before afterwards.
        conditioning: The calibration's prompts.
        settings: The calibration's settings; the seed decides which calls are taken and how gates are drawn.
        groups: Of the denoiser's graph.
        quiet: No progress bar.

    Raises:
        UserError: The loss is not finite.
    """
    started = time.perf_counter()
    calls, rows = _recorded(subject, conditioning, settings, quiet)
    device = next(subject.denoiser.parameters()).device
    openness = {g.name: torch.full((g.count,), START, device=device, requires_grad=True) for g in groups}
    optimizer = torch.optim.AdamW(openness.values(), lr=RATE)
    generator = torch.Generator().manual_seed(settings.seed)
    order = _orders(len(calls), generator)
    losses = []
    with eval_mode(subject.pipe), accumulated(subject, {}), torch.enable_grad():
        for _ in track(range(STEPS), STEPS, "learning gates", quiet):
            total = 0.0
            for _ in range(DRAWS):
                drawn = {g.name: torch.rand(g.count, generator=generator).to(device) for g in groups}
                picked = torch.tensor([next(order) for _ in range(CALLS)])
                for part in picked.split(settings.batch_size):
                    opened = {name: hard_concrete(openness[name], uniform) for name, uniform in drawn.items()}
                    loss = calls.errors(part, subject.graph, groups, opened).sum() / (DRAWS * CALLS)
                    loss.backward()
                    total += float(loss.detach())
            torch.stack([PRESSURE * open_probability(value).mean() for value in openness.values()]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    if not all(map(math.isfinite, losses)) or not all(bool(v.isfinite().all()) for v in openness.values()):
        raise UserError("the loss of the gates is not finite; try --dtype float32")
    rows += STEPS * DRAWS * CALLS * calls.rows_each * (1 + 1 + BACKWARD)
    tenth = max(1, STEPS // 10)
    ends = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    learned = {name: value.detach() for name, value in openness.items()}
    return LearnedGates(learned, ends, STEPS, rows, time.perf_counter() - started)


def _orders(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers of calls, each once before any comes again, for ever."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def gates_on(graph: Graph, groups: Sequence[Group], opened: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply what the consumers of the units read by the units' gates while the context is open.

    Args:
        graph: Of the denoiser.
        groups: Whose units.
        opened: Gates by group, float32 (count,).
    """
    handles = []
    try:
        for group in groups:
            for s in group.consumers:
                layer = graph.layer(s.layer)
                entries = s.entries(torch.ones(group.count, dtype=torch.bool)).to(opened[group.name].device)
                width = graph.weight(s.layer).shape[1]
                values = opened[group.name].repeat_interleave(s.size).repeat(len(s.starts))
                factors = torch.ones(width, device=values.device).index_copy(0, entries, values)

                def multiply(layer: nn.Module, inputs: tuple[Tensor, ...], factors: Tensor = factors) -> Any:
                    x = inputs[0]
                    along = factors.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else factors
                    return (x * along.to(x.dtype), *inputs[1:])

                handles.append(layer.register_forward_pre_hook(multiply))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Calls:
    """Recorded calls of the dense denoiser.

    Attributes:
        subject: The pipeline.
        latents, times: What it was given, (calls, ...) on the CPU.
        which: Of two denoisers, the number of the one that was asked, (calls,).
        prompts: Whose prompt it was, (calls,).
        embeds, common: What the denoiser is told of each prompt, and of all.
        guidance: Scale; None: each call is one row.
    """

    subject: Subject
    latents: Tensor
    times: Tensor
    which: Tensor
    prompts: Tensor
    embeds: Mapping[str, Tensor]
    common: Mapping[str, Any]
    guidance: float | None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def rows_each(self) -> int:
        return 1 if self.guidance is None else 2

    def errors(self, at: Tensor, graph: Graph, groups: Sequence[Group], opened: Mapping[str, Tensor]) -> Tensor:
        """The guided output's squared error over the dense one's power of some calls, float32 (n,)."""
        with torch.no_grad():
            wanted = self._guided(at)
        with gates_on(graph, groups, opened):
            found = self._guided(at)
        power = wanted.square().flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        return (found - wanted).square().flatten(1).sum(1) / power

    def _guided(self, at: Tensor) -> Tensor:
        device = next(self.subject.denoiser.parameters()).device
        embeds = {name: tensor[self.prompts[at]].to(device) for name, tensor in self.embeds.items()}
        if len(self.subject.components) > 1:
            embeds[WHICH] = self.which[at]
        plain = self.guidance is None
        told = drop_prompts(embeds, torch.zeros(len(at), dtype=torch.bool)) if plain else both_prompts(embeds)
        latents, times = self.latents[at].to(device), self.times[at].to(device)
        if not plain:
            latents, times = torch.cat([latents, latents]), torch.cat([times, times])
        answer = call_denoiser(self.subject.denoiser, latents, times, told, self.common).float()
        if self.guidance is None:
            return answer
        negative, positive = answer.chunk(2)
        return negative + self.guidance * (positive - negative)


@torch.no_grad()
def _recorded(subject: Subject, conditioning: Conditioning, settings: Settings, quiet: bool) -> tuple[_Calls, int]:
    """Denoise every prompt and keep as many of each trajectory's calls, drawn at random, as are seen; and the rows that
    took."""
    recorder = Recorder(subject, conditioning)
    count, size, rows = len(conditioning), settings.batch_size, 0
    each = math.ceil(STEPS * DRAWS * CALLS / count)
    seeds = noise_seeds(settings.seed, count)
    latents, times, which, prompts = [], [], [], []
    with eval_mode(subject.pipe), seen_calls(subject, recorder.see):
        batches = run_trajectories(subject, conditioning, seeds, size, settings.call, recorder.begin)
        for part, _ in track(batches, math.ceil(count / size), "recording calls", quiet):
            seen = recorder.seen
            rows += len(seen) * recorder.rows_each * (part.stop - part.start)
            for row, prompt in enumerate(range(part.start, part.stop)):
                chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seeds[prompt]))[:each]
                for number in sorted(chosen.tolist()):
                    sample, at, model = seen[number]
                    latents.append(sample[row].clone())
                    times.append(at[0])
                    which.append(model)
                    prompts.append(prompt)
    embeds = recorder.embeds()
    scale = float(settings.call.get("guidance_scale") or 1.0) + subject.family.guidance_offset
    guided = scale > 1 and any(name.startswith(NEGATIVE) for name in embeds)
    calls = _Calls(
        subject,
        torch.stack(latents),
        torch.stack(times),
        torch.tensor(which),
        torch.tensor(prompts),
        embeds,
        recorder.common,
        scale if guided else None,
    )
    return calls, rows
