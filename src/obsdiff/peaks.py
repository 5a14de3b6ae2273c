"""Moments of a run that is planned, and when memory is at its most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A moment at which memory may be at its most: bytes by part, on the device and on the host."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a run will need of memory.

    Attributes:
        moments: All that were considered.
        on_host: Whether the device is the host, so that both parts lie in one memory.
    """

    moments: tuple[Moment, ...]
    on_host: bool

    @property
    def device(self) -> Moment | None:
        """When the device holds most; None where it is the host."""
        return None if self.on_host else max(self.moments, key=lambda moment: sum(moment.device.values()))

    @property
    def host(self) -> Moment:
        """When the host holds most."""
        return max(self.moments, key=lambda moment: sum(host_parts(moment, self.on_host).values()))

    @property
    def device_bytes(self) -> int:
        """The most on the device; 0 where it is the host."""
        return 0 if self.device is None else sum(self.device.device.values())

    @property
    def host_bytes(self) -> int:
        """The most on the host."""
        return sum(host_parts(self.host, self.on_host).values())


def host_parts(moment: Moment, on_host: bool) -> dict[str, int]:
    """What lies on the host: where it is the device too, everything."""
    parts = dict(moment.host)
    for part, size in moment.device.items() if on_host else ():
        parts[part] = parts.get(part, 0) + size
    return parts
