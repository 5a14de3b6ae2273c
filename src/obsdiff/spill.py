"""Tensors put away on a disk, in a file without a name: it is gone with the process, however that ends."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from obsdiff.files import clear_failures

_regions: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address


@dataclass(frozen=True)
class Spilled:
    """A tensor that is away.

    Attributes:
        offset: Of its first byte in the file.
        like: It without its data, on the meta device.
    """

    offset: int
    like: Tensor


class Spill:
    """Tensors in a file.

    Args:
        folder: On whose disk; made where it is not there.
    """

    step_bytes = 1  # that places begin at multiples of

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with clear_failures(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._free: dict[int, list[int]] = {}  # places by their bytes

    def put(self, tensor: Tensor) -> Spilled:
        """Write a tensor; what holds its memory can let go.

        Raises:
            UserError: It cannot be written.
        """
        like = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            like = nn.Parameter(like, tensor.requires_grad)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        free = self._free.get(content.nbytes)
        offset = free.pop() if free else self._end
        with clear_failures(self._folder):
            self._file.seek(offset)
            self._file.write(content.data)
            self._file.flush()  # a full disk is told here
        self._end = max(self._end, -(-(offset + content.nbytes) // self.step_bytes) * self.step_bytes)
        return Spilled(offset, like)

    def release(self, spilled: Spilled) -> None:
        """Its place may be taken by another tensor of as many bytes; it cannot be read any more."""
        self._free.setdefault(spilled.like.nbytes, []).append(spilled.offset)

    def take(self, spilled: Spilled, device: torch.device | str = "cpu") -> Tensor:
        """Read one again: another object with the same values, on ``device``, laid out as it was; a parameter, where it
        was one.

        Raises:
            OSError: It cannot be read whole.
        """
        like = spilled.like
        value = torch.empty(like.shape, dtype=like.dtype)  # aligned as others are: a product may round by that, too
        self._file.seek(spilled.offset)
        if (count := self._file.readinto(value.reshape(-1).view(torch.uint8).numpy().data)) != like.nbytes:
            raise OSError(f"{count} of {like.nbytes} bytes could be read")
        if not like.is_contiguous():
            value = torch.empty_like(like, device="cpu").copy_(value)  # else what reads it may round otherwise
        value = value.to(device)
        return nn.Parameter(value, like.requires_grad) if isinstance(like, nn.Parameter) else value

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


class Shelf(Spill):
    """Tensors whose memory is a file, so that what is not read of them takes none."""

    step_bytes = mmap.ALLOCATIONGRANULARITY

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._regions: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def mapped(self, tensor: Tensor) -> Tensor:
        """A tensor with the same values, laid out as it is, whose memory is the file: what is read of it comes from
        there and stays in memory until :meth:`drop`, what is written into it goes there. Its place is free when it is
        gone.

        Raises:
            UserError: It cannot be written.
        """
        if not tensor.nbytes:
            return tensor.detach()
        like = torch.empty_like(tensor, device="meta")  # dense, if the tensor has gaps
        laid = (
            tensor.detach() if like.stride() == tensor.stride() else torch.empty_like(like, device="cpu").copy_(tensor)
        )
        spilled = self.put(laid.as_strided((laid.numel(),), (1,)))
        region = mmap.mmap(self._file.fileno(), like.nbytes, offset=spilled.offset)
        weakref.finalize(region, self.release, spilled).atexit = False
        value = torch.frombuffer(region, dtype=like.dtype).as_strided(like.shape, like.stride())
        self._regions.add(region)
        _regions[value.data_ptr()] = region
        return value

    def drop(self) -> None:
        """Let all that was read of mapped tensors leave memory; it comes back as it is read again."""
        for region in list(self._regions):
            _drop(region)


def in_turn(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors; of each that is mapped, what was read of it leaves memory before the next one comes."""
    for tensor in tensors:
        yield tensor
        if (region := _regions.get(tensor.data_ptr())) is not None:
            _drop(region)


def _drop(region: mmap.mmap) -> None:
    if hasattr(region, "madvise"):  # else the system decides alone
        region.madvise(mmap.MADV_DONTNEED)
