"""What an energy measurement reads: the counters that Zeus finds, and CodeCarbon's models for what has none.

Zeus's devices are read one by one, not through its `ZeusMonitor`: that one starts a process for each CPU zone to watch
for a counter that starts again, which imports the user's script anew, and it adds the zone "psys" to the packages that
are in it already.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError

Source = Literal["counter", "sampled", "estimated"]
SOURCES = ("counter", "sampled", "estimated")
KINDS = ("joules", "watts")


@dataclass(frozen=True)
class Channel:
    """One number that a meter can read at any time.

    component: what it is of: "gpu", "cpu", "ram", or any other word; channels of one component are added, so none may
    be part of another. kind: "joules" for a counter that only rises, "watts" for power at the moment of reading.
    source: "counter" for a device's own energy counter, "sampled" for a device's power sensor, "estimated" for a
    model. read: gives the count. unit: joules (or watts) that one count is. wraps_at: the count at which it starts
    again from 0, as 2**32; None if it never does.
    """

    component: str
    kind: Literal["joules", "watts"]
    source: Source
    read: Callable[[], float]
    unit: float = 1.0
    wraps_at: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.source not in SOURCES:
            raise InputError(
                f"a channel's kind must be one of {KINDS} and its source one of {SOURCES}, "
                f"got {self.kind!r} and {self.source!r}"
            )
        if not self.unit > 0 or not (self.wraps_at is None or self.wraps_at > 0):
            raise InputError(f"a channel's unit and wraps_at must be > 0, got {self.unit!r} and {self.wraps_at!r}")


class Meter(Protocol):
    """Where joules come from: channels, and what the reader of their sum must know."""

    def channels(self) -> Sequence[Channel]:
        """The channels, fresh for one measurement."""
        ...

    def note(self) -> str:
        """What they leave out or guess; "" for nothing."""
        ...


class MachineMeter:
    """Everything of this machine that can be metered: GPUs, CPU packages and memory.

    Counters by Zeus (NVIDIA and AMD GPUs; Intel and AMD CPUs and memory by RAPL, where its files can be read). For CPU
    and memory without one, CodeCarbon's models: a CPU draws tdp·(0.1 + 0.9·load³) watts and x86 memory 5 W a module,
    both guesses by hardware, not measurements. A GPU has no model: without a counter its joules are NaN.

    gpus: indices of the GPUs to count, as CUDA numbers them; the default is all visible ones. tdp_watts, ram_watts:
    what the models assume of this machine in place of CodeCarbon's own guess.

    All that runs on the machine is counted, other processes too: of several ranks on a machine, measure in one, or
    give each its own GPU and count the CPU once. Apple's chips have no counter here: they are estimated.
    """

    def __init__(
        self, *, gpus: Sequence[int] | None = None, tdp_watts: float | None = None, ram_watts: float | None = None
    ) -> None:
        given = {"tdp_watts": tdp_watts, "ram_watts": ram_watts}
        check_positive(**{name: watts for name, watts in given.items() if watts is not None})
        _load("zeus.device")
        self._gpus, self._tdp_watts, self._ram_watts = gpus, tdp_watts, ram_watts
        self._notes: list[str] = []

    def channels(self) -> list[Channel]:
        """Counters first; a model for the CPU or the memory that has none."""
        self._notes = []
        found = _gpu_channels(self._gpus, self._notes) + _rapl_channels()
        has = {channel.component for channel in found}
        if "cpu" not in has:
            found.append(self._estimated_cpu())
        if "ram" not in has:
            found.append(self._estimated_ram())
        return found

    def note(self) -> str:
        """What was guessed or left out at the last `channels`."""
        return "; ".join(self._notes)

    def _estimated_cpu(self) -> Channel:
        hardware = _load("codecarbon.external.hardware")
        model, tdp, guessed = cpu_power_rating() if self._tdp_watts is None else ("CPU", self._tdp_watts, False)
        cpu = hardware.CPU(output_dir="", mode="cpu_load", model=model, tdp=tdp, tracking_mode="machine")
        cpu.start()
        origin = "guessed from its threads" if guessed else "given" if self._tdp_watts is not None else "of its model"
        self._notes.append(f"cpu estimated from its load and {tdp:g} W {origin}")
        return Channel("cpu", "joules", "estimated", _accumulated(lambda: float(cpu.total_power().W)))

    def _estimated_ram(self) -> Channel:
        watts, origin = self._ram_watts, "given"
        if watts is None:
            watts, origin = float(_load("codecarbon.external.ram").RAM().total_power().W), "guessed from its size"
        self._notes.append(f"ram estimated as {watts:.3g} W {origin}")
        return Channel("ram", "watts", "estimated", lambda: watts)


def _accumulated(watts_since_last: Callable[[], float]) -> Callable[[], float]:
    """Joules so far, from a reading that is the mean power since the one before: no trapezoid, which would shift it."""
    state = {"joules": 0.0, "at": time.perf_counter()}

    def read() -> float:
        watts, now = watts_since_last(), time.perf_counter()
        state["joules"] += watts * (now - state["at"])
        state["at"] = now
        return state["joules"]

    return read


def _gpu_channels(indices: Sequence[int] | None, notes: list[str]) -> list[Channel]:
    """Energy counters in mJ, power in mW of GPUs older than Volta, NaN for a GPU that torch has and Zeus has not."""
    device = _load("zeus.device")
    try:
        with _silent():
            devices = device.get_gpus()
            supported = [devices.supports_get_total_energy_consumption(i) for i in range(len(devices))]
    except Exception as error:  # a GPU library may fail in any way: with a GPU in use, that is said
        if torch.cuda.is_available() and (indices is None or len(indices)):
            notes.append(f"gpu not metered: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            return [Channel("gpu", "watts", "sampled", lambda: float("nan"))]
        supported = []
    chosen = range(len(supported)) if indices is None else indices
    if any(not 0 <= i < len(supported) for i in chosen):
        raise InputError(f"gpus must be indices of the {len(supported)} GPUs that can be metered, got {list(chosen)}")
    channels = []
    for i in chosen:
        if supported[i]:
            channels.append(Channel("gpu", "joules", "counter", _of(devices.get_total_energy_consumption, i), 1e-3))
        else:
            channels.append(Channel("gpu", "watts", "sampled", _of(devices.get_instant_power_usage, i), 1e-3))
    return channels


def _of(read: Callable[[int], float], index: int) -> Callable[[], float]:
    return lambda: read(index)


def _rapl_channels() -> list[Channel]:
    """Each CPU package and its memory; the zone "psys", which holds both again, is left out."""
    device = _load("zeus.device")
    try:
        with _silent():
            packages = list(device.get_cpus().cpus)
    except Exception:  # no RAPL, or none that may be read: then there is no counter
        return []
    channels = []
    for package in packages:
        if not hasattr(package, "rapl_file"):
            channels += _daemon_channels(package)
        elif package.rapl_file.name.startswith("package"):
            channels.append(_rapl_channel("cpu", package.rapl_file))
            if package.dram is not None:
                channels.append(_rapl_channel("ram", package.dram))
    return channels


def _daemon_channels(package: Any) -> list[Channel]:
    """A package behind Zeus's daemon, which counts the turns of the counters itself."""
    read = package.get_total_energy_consumption
    channels = [Channel("cpu", "joules", "counter", lambda: float(read().cpu_mj), 1e-3)]
    if package.supports_get_dram_energy_consumption():
        channels.append(Channel("ram", "joules", "counter", lambda: float(read().dram_mj), 1e-3))
    return channels


def _rapl_channel(component: str, zone: Any) -> Channel:
    path = Path(zone.energy_uj_path)
    return Channel(component, "joules", "counter", lambda: int(path.read_text()), 1e-6, zone.max_energy_range_uj)


@cache
def cpu_power_rating() -> tuple[str, float, bool]:
    """The CPU's model, its thermal design power in watts, and whether that is but 4 W a thread. Takes a second."""
    cpu = _load("codecarbon.core.cpu")
    threads = max(1, _load("codecarbon.core.util").count_cpus() or 1)
    with _silent():
        found = cpu.TDP()
    default = float(cpu.DEFAULT_POWER_PER_CORE * threads)
    tdp = float(found.tdp or default)
    return found.model or "unknown", tdp, tdp == default


def _load(module: str) -> Any:
    try:
        with _silent(), contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ImportError:
        raise InputError('measuring energy needs the extra: pip install "batchlab[energy]"') from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What the two packages log in here is dropped; their loggers are as they were after."""
    loggers = [logging.getLogger(name) for name in ("zeus", "codecarbon", *_children())]
    reject: Callable[[logging.LogRecord], bool] = lambda record: False  # noqa: E731
    for logger in loggers:
        logger.addFilter(reject)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(reject)


def _children() -> list[str]:
    return [name for name in list(logging.Logger.manager.loggerDict) if name.startswith(("zeus.", "codecarbon."))]
