"""How much memory a device has left, and how much a step took at its peak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CONTROL_GROUPS = (  # version 2, version 1: folder, limit, use, reclaimable
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Meter(Protocol):
    """usable: bytes that a step may take in all. start, peak: around one step, the bytes it took at its peak."""

    usable: int

    def start(self) -> None:
        """Before a step."""

    def peak(self) -> int | None:
        """After it: bytes taken at most since `start`, above what was held when the meter was made. None: unknown."""


class CudaMeter:
    """The caching allocator's own count. Usable: what is free on the device now, and what the cache holds unused.

    It is less where `torch.cuda.set_per_process_memory_fraction` allows this process no more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, every = torch.cuda.mem_get_info(device)
        self._held = torch.cuda.memory_allocated(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        own = int(torch.cuda.get_per_process_memory_fraction(index) * every)
        self.usable = min(free + torch.cuda.memory_reserved(device), own) - self._held

    def start(self) -> None:
        """Forgets the last peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Of allocated bytes; blocks that fragmentation wastes are not in it, which is what the headroom is for."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._held


class ProcessMeter:
    """The resident memory of this process. Usable: what the system or its control group has available now.

    The kernel's high-water mark is reset at each start (Linux only; elsewhere the peak is unknown).
    """

    def __init__(self) -> None:
        self.usable = available_memory()
        self._held = _resident()

    def start(self) -> None:
        """Brings the high-water mark down to what is resident now."""
        self._works = _reset_high_water()

    def peak(self) -> int | None:
        """Above what was resident when the meter was made; memory that was free to reuse is not in it."""
        high = _high_water()
        return max(0, high - self._held) if self._works and high is not None else None


def meter(device: torch.device) -> Meter:
    """The meter for a device."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


def available_memory() -> int:
    """Bytes that this process can still take without swapping: the system's, or less if a control group says so.

    Its own group and all above it count, as a scheduler or a service manager sets them. Pages of files that were not
    used lately count as available, as the kernel itself does.
    """
    left = [_meminfo_available()]
    for root, limit_file, used_file, cached in _CONTROL_GROUPS:
        for folder in _groups_below(root):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                left.append(max(0, limit - used + _cached(folder / "memory.stat", cached)))
    return min(left)


def _groups_below(root: Path) -> set[Path]:
    """The root, and this process's groups under it: a line says "0::/path" in version 2, "7:memory:/path" in 1."""
    found = {root}
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            own = root / path.lstrip("/")
            found |= {own, *(parent for parent in own.parents if parent.is_relative_to(root))}
    return found


def _cached(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _meminfo_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * _PAGE // 2


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * _PAGE if statm.exists() else 0


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
