"""The denoiser from one block on, on hidden states that were computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.allocation.probe import BATCH_ROWS, Probe, power
from obsdiff.models.modes import eval_mode
from obsdiff.models.wiring import Wiring


class _Given(nn.Module):
    """Stands where blocks were; returns what they would."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value


class Restart:
    """Output errors of a changed denoiser on a probe, without repeating the blocks in front of the change.

    Where the blocks are a chain (:attr:`obsdiff.models.families.Family.chain`), the outputs of the block in front of
    ``first`` are kept, one set at a time: memory for one hidden state per probe row. Elsewhere every call is whole.
    """

    def __init__(self, wiring: Wiring, probe: Probe, rows: int = BATCH_ROWS) -> None:
        self.wiring = wiring
        self.probe = probe
        self.chain = wiring.family.chain
        batches = list(probe.batches(rows))
        self.arguments = [arguments for arguments, _ in batches]
        self.weights = [weights for _, weights in batches]
        self.first = 0
        self._given: list[Any] = []
        self.blocks_run = 0  # runs of a block on the whole probe, for the cost
        self.dense = list(self._outputs())
        self.power = power(self.dense, self.weights)

    def advance(self, block: int) -> None:
        """From now on all changes are in ``block`` or behind it. The denoiser must be dense now."""
        if not self.chain or block == self.first:
            return
        assert block > self.first
        last = self.wiring.denoiser.get_submodule(f"{self.wiring.family.blocks}.{block - 1}")
        seen: list[Any] = []
        handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            for _ in self._outputs():
                pass
        finally:
            handle.remove()
        self._given, self.first = seen, block

    def error(self) -> float:
        """``Σ α_t ‖now − dense‖² / Σ α_t ‖dense‖²`` of the guided output of the denoiser as it is now."""
        differences = (now - dense for now, dense in zip(self._outputs(), self.dense, strict=True))
        error = power(differences, self.weights) / self.power
        return error if error == error else float("inf")  # NaN: the change broke the model

    @torch.no_grad()
    def _outputs(self) -> Iterator[Tensor]:
        self.blocks_run += self.wiring.num_blocks - self.first
        with self._shortened() as given:
            for i, arguments in enumerate(self.arguments):
                given.value = self._given[i] if self._given else None
                output = self.wiring.denoiser(**arguments)
                answer = output[0] if isinstance(output, tuple) else output.sample
                yield self.probe.guided(answer, len(self.weights[i]))

    @contextmanager
    def _shortened(self) -> Iterator[_Given]:
        """The denoiser with the blocks in front of ``first`` replaced; as before afterwards."""
        given = _Given()
        name = self.wiring.family.blocks
        blocks = self.wiring.denoiser.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        if self.first:
            setattr(self.wiring.denoiser, name, nn.ModuleList([*[given] * self.first, *blocks[self.first :]]))
        try:
            with eval_mode(self.wiring.denoiser):
                yield given
        finally:
            setattr(self.wiring.denoiser, name, blocks)
