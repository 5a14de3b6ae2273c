"""Several processes: who am I, and what do the others hold. Everything works alone as well."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from obsdiff.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def joined_processes(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` started, if it did, for as long as the context lasts.

    Args:
        device: What the user named; for "cuda" each process of a machine gets a device of its own.

    Yields:
        This process's device.
    """
    if started_processes() == 1 or distributed.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def started_processes() -> int:
    """Processes that ``torchrun`` started, whether or not they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_first() -> bool:
    """Whether this is the first of them."""
    return started_processes() == 1 or os.environ.get("RANK") == "0"


def world_size() -> int:
    """Processes that work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def own_share(count: int, unit: int = 1) -> slice:
    """This process's contiguous share of ``count`` items, cut at multiples of ``unit``; shares differ by one unit."""
    units = -(-count // unit)
    first, last = (min(units * at // world_size() * unit, count) for at in (rank(), rank() + 1))
    return slice(first, last)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast_numbers(values: Sequence[float], device: torch.device | str) -> list[float]:
    """The first process's ``values`` on every process, as one small float64 tensor on ``device``."""
    if world_size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.broadcast(numbers, 0)
    return [float(number) for number in numbers.tolist()]


def from_all(value: T) -> list[T]:
    """The values of all processes, in their order, on every process; of several, tensors come plain and on the CPU."""
    if world_size() == 1:
        return [value]
    return [receive() for receive in _from_each(value)]


def solved_in_turn(
    items: Sequence[T], solve: Callable[[T], R], cost: Callable[[T], float] | None = None
) -> Iterator[tuple[T, R]]:
    """``solve`` every item, each on one process, and give every process all results.

    Args:
        items: What to solve.
        solve: Is called with one of them.
        cost: Of an item, so that several processes solve those of like cost at the same time, the dearest first; None:
            in their order.

    Raises:
        UserError: Some process raised it; then all do.
    """
    if world_size() == 1:
        yield from ((item, solve(item)) for item in items)
        return
    if cost is not None:
        items = sorted(items, key=cost, reverse=True)
    for start in range(0, len(items), world_size()):
        yield from _round(items[start : start + world_size()], solve)


def _round(part: Sequence[T], solve: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """One item, or none, on each process; nothing of it is held when the next round begins."""
    found: R | None = None
    failure: UserError | None = None
    if rank() < len(part):
        try:
            found = solve(part[rank()])
        except UserError as error:
            failure = error
    for item, receive in zip(part, _from_each((found, failure)), strict=False):
        result, failed = receive()  # one by one: nobody holds those of all
        if failed is not None:
            raise failed
        yield item, result  # type: ignore[misc]  # no error, so there is a result


class _Outline(pickle.Pickler):
    """Pickles a value without its tensors, which travel as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Filled(pickle.Unpickler):
    """Puts the tensors into their places."""

    def __init__(self, outline: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(outline))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _from_each(value: T) -> list[Callable[[], T]]:
    """By process a function that receives its value; all processes call all, or the first few, in this order."""
    file = io.BytesIO()
    outline = _Outline(file)
    outline.dump(value)
    said: list[Any] = [None] * world_size()
    distributed.all_gather_object(said, (file.getvalue(), [(t.shape, t.dtype) for t in outline.tensors]))
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"

    def receive(source: int) -> T:
        told, kinds = said[source]
        tensors = []
        for at, (shape, dtype) in enumerate(kinds):
            own = outline.tensors[at] if rank() == source else torch.empty(shape, dtype=dtype, device=device)
            sent = own.to(device).contiguous()
            if sent.numel():
                distributed.broadcast(sent.reshape(-1).view(torch.uint8), source)
            tensors.append(sent.cpu())
        filled: T = _Filled(told, tensors).load()
        return filled

    return [partial(receive, source) for source in range(world_size())]


def wait_for_all() -> None:
    """Return when every process is here."""
    if world_size() > 1:
        distributed.barrier()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over the processes (each of them must ask)."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded: the same memory."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def sharded_like(whole: Tensor, example: Tensor) -> Tensor:
    """This process's part of ``whole``, cut as ``example`` is."""
    if not hasattr(example, "device_mesh"):
        return whole.to(example.device)
    from torch.distributed.tensor import distribute_tensor

    cut = distribute_tensor(whole.to(example.device), example.device_mesh, example.placements)  # type: ignore[attr-defined]
    return cut.to_local()


def seed_for(*parts: int) -> int:
    """One seed out of several counters, well mixed."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 6_364_136_223_846_793_005 + part * 1_442_695_040_888_963_407 + 1) % 2**63
    return mixed


def keyed_generator(*parts: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone: on no state, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(seed_for(*parts))
