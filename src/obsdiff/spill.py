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

PART_BYTES = 2**26  # of a file, that are mapped at once at least
_pages: dict[int, _Pages] = {}  # of mapped tensors, by address


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

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with clear_failures(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # without a buffer: what a full disk does not take would wait there, and fail whatever is read next
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115  # closed with this object
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
        with clear_failures(self._folder):
            offset = self._place(content.nbytes)
            self._file.seek(offset)
            left = content.data
            while left.nbytes:  # the system may take less at once, and tells a full disk with the next part
                left = left[self._file.write(left) :]
        self._end = max(self._end, offset + content.nbytes)
        return Spilled(offset, like)

    def _place(self, count: int) -> int:
        """Where so many bytes may lie."""
        free = self._free.get(count)
        return free.pop() if free else self._end

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
        left = value.reshape(-1).view(torch.uint8).numpy().data
        while left.nbytes and (count := self._file.readinto(left)):
            left = left[count:]
        if left.nbytes:
            raise OSError(f"{like.nbytes - left.nbytes} of {like.nbytes} bytes could be read")
        if not like.is_contiguous():
            value = torch.empty_like(like, device="cpu").copy_(value)  # else what reads it may round otherwise
        value = value.to(device)
        return nn.Parameter(value, like.requires_grad) if isinstance(like, nn.Parameter) else value

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


@dataclass(frozen=True)
class _Pages:
    """Where a mapped tensor lies: in one of the parts of a file that are mapped as a whole, since each takes a file
    descriptor."""

    part: mmap.mmap
    start: int
    count: int

    def drop(self) -> None:
        """Let what was read of it leave memory."""
        if hasattr(self.part, "madvise"):  # else the system decides alone
            self.part.madvise(mmap.MADV_DONTNEED, self.start, self.count)


class Shelf(Spill):
    """Tensors whose memory is a file, so that what is not read of them takes none.

    Processes that are forked from this one share them, and may only read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parts: dict[int, mmap.mmap] = {}  # by their first byte in the file, rising
        self._mapped_end = 0

    def mapped(self, tensor: Tensor) -> Tensor:
        """A tensor with the same values, laid out as it is, whose memory is the file: what is read of it comes from
        there and stays in memory until :meth:`drop`, what is written into it goes there. Its place is free when it is
        gone.

        Raises:
            UserError: It cannot be written.
        """
        if not tensor.nbytes:
            return tensor.detach()
        laid = tensor.detach()
        like = torch.empty_like(laid, device="meta")  # dense, if the tensor has gaps
        if like.stride() != laid.stride():
            laid = torch.empty_like(like, device="cpu").copy_(laid)
        spilled = self.put(laid.as_strided((laid.numel(),), (1,)))
        first = max(first for first in self._parts if first <= spilled.offset)
        pages = _Pages(self._parts[first], spilled.offset - first, like.nbytes)
        view = memoryview(pages.part)[pages.start : pages.start + pages.count]
        value = torch.frombuffer(view, dtype=like.dtype).as_strided(like.shape, like.stride())
        _pages[value.data_ptr()] = pages
        weakref.finalize(view, self._gone, value.data_ptr(), spilled).atexit = False
        return value

    def drop(self) -> None:
        """Let all that was read of mapped tensors leave memory; it comes back as it is read again."""
        for part in self._parts.values():
            _Pages(part, 0, len(part)).drop()

    def _place(self, count: int) -> int:
        if self._free.get(count):
            return super()._place(count)
        self._end = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._end + count > self._mapped_end:
            size = max(count, PART_BYTES, self._end // 4)  # so that there are few, however large it becomes
            self._file.truncate(self._end + size)  # takes no room before it is written
            self._parts[self._end] = mmap.mmap(self._file.fileno(), size, offset=self._end)
            self._mapped_end = self._end + size
        return self._end

    def _gone(self, address: int, spilled: Spilled) -> None:
        del _pages[address]
        self.release(spilled)


def in_turn(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors; of each that is mapped, what was read of it leaves memory before the next one comes."""
    for tensor in tensors:
        yield tensor
        if (pages := _pages.get(tensor.data_ptr())) is not None:
            pages.drop()
