"""Joules and CO2e of a block of code or a run: E = ∫P dt, from counters where there are some, else labelled estimated.

A counter gives E as a difference; power readings are integrated by the trapezoid rule over their own times.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from batchlab.core.errors import InputError
from batchlab.measure.energy.energy_meters import SOURCES, Channel, MachineMeter, Meter
from batchlab.measure.energy.energy_use import FEW_SAMPLES, ComponentEnergy, EnergyUse, check_carbon


class Integral:
    """Joules of one channel since its first reading, in constant memory.

    A counter's differences are added as its own counts, so that integers stay exact; one that starts again from 0 is
    followed as long as two readings are less than one turn apart. One that falls without a known turn gives NaN.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel, self.failure = channel, ""
        self._total: float = 0
        self._last: tuple[float, float] | None = None

    def read(self, clock: Callable[[], float]) -> None:
        """Takes one reading; a meter that fails makes the sum unknown, never an exception in the measured block."""
        try:
            at, count = clock(), self.channel.read()
            self.add(at, count)
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"

    def add(self, at: float, count: float) -> None:
        """A reading of `count` at `at` seconds."""
        before, self._last = self._last, (at, count)
        if before is None:
            return
        if self.channel.kind == "watts":
            self._total += 0.5 * (count + before[1]) * (at - before[0])
        elif count >= before[1] or self.channel.wraps_at is None:
            self._total += count - before[1] if count >= before[1] else math.nan
        else:
            self._total += count - before[1] + self.channel.wraps_at

    @property
    def joules(self) -> float:
        """∫P dt so far."""
        return math.nan if self.failure else self._total * self.channel.unit


class _Window:
    """All channels from one moment on."""

    def __init__(self, channels: Sequence[Channel], clock: Callable[[], float]) -> None:
        self._integrals, self._clock = [Integral(channel) for channel in channels], clock
        self._lock, self.samples = threading.Lock(), 0
        self.started = self.ended = clock()
        self.sample()

    def sample(self) -> None:
        with self._lock:
            self.ended = self._clock()
            for integral in self._integrals:
                integral.read(self._clock)
            self.samples += 1

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def components(self, idle: dict[str, float]) -> tuple[ComponentEnergy, ...]:
        names = dict.fromkeys(integral.channel.component for integral in self._integrals)
        of = {name: [each for each in self._integrals if each.channel.component == name] for name in names}
        worst = {name: max((each.channel.source for each in of[name]), key=SOURCES.index) for name in names}
        return tuple(
            ComponentEnergy(name, float(sum(each.joules for each in of[name])), worst[name], idle.get(name))
            for name in names
        )

    def failures(self) -> list[str]:
        return [f"{each.channel.component} failed: {each.failure}" for each in self._integrals if each.failure]


class Energy:
    """Measures what a block of code or a run uses.

        with Energy(idle_seconds=5, g_per_kwh=380) as energy:
            train()
        energy.joules, energy.use.kg_co2e, energy.use.per(steps=1000)

    meter: where joules come from; the default `MachineMeter` counts all visible GPUs, the CPU and the memory, with
    Zeus's counters where they exist and CodeCarbon's models, labelled "estimated", where not; it needs the extra
    "energy". gpus: which GPUs it counts. idle_seconds: how long the machine is left alone and measured before the
    block, so that `net_joules` is known; the default 0 leaves it out. interval: seconds between readings, from a
    thread; 0.5 sees what lasts seconds. None starts no thread: call `sample` yourself. g_per_kwh: the grid's grams of
    CO2e for a kWh, None where you do not know it: no country is guessed. pue: at least 1; the default 1 counts the
    machine alone. clock, sleep: for simulations.

    GPU work launched before and inside the block is waited for at both ends. One object may measure block after block;
    `use` is the last one's. Nothing is written, no network is used.

    Not for comparing single short blocks: counters lag by 0.1 s, and the machine's other work is counted too. Compare
    whole runs, repeated, with `compare_energy`. An estimate from load and size cannot tell two precisions apart that
    take the same time.
    """

    def __init__(
        self,
        meter: Meter | None = None,
        *,
        gpus: Sequence[int] | None = None,
        idle_seconds: float = 0.0,
        interval: float | None = 0.5,
        g_per_kwh: float | None = None,
        pue: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_carbon(g_per_kwh, pue)
        if not 0 <= idle_seconds < math.inf:
            raise InputError(f"idle_seconds must be finite and >= 0, got {idle_seconds!r}")
        if interval is not None and not 0 < interval < math.inf:
            raise InputError(f"interval must be finite and > 0, or None, got {interval!r}")
        if meter is not None and gpus is not None:
            raise InputError(f"gpus is for the default meter, which was replaced; got gpus={gpus!r}")
        self._meter: Meter = MachineMeter(gpus=gpus) if meter is None else meter
        self._idle_seconds, self._interval = idle_seconds, interval
        self._g_per_kwh, self._pue = g_per_kwh, pue
        self._clock, self._sleep = clock, sleep
        self._window: _Window | None = None
        self._idle: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._use: EnergyUse | None = None

    def start(self) -> None:
        """Measures the idle machine if asked, and begins the block."""
        if self._window is not None:
            raise InputError("this energy measurement is under way: call stop before start")
        channels = list(self._meter.channels())
        if not channels:
            raise InputError("the meter has no channel: there is nothing that it could read")
        self._idle = self._idle_watts(channels) if self._idle_seconds else {}
        _wait_for_devices()
        self._use, self._window = None, _Window(channels, self._clock)
        if self._interval is not None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._poll, name="batchlab-energy", daemon=True)
            self._thread.start()

    def stop(self) -> EnergyUse:
        """Ends the block: what it used."""
        if self._window is None:
            raise InputError("no energy measurement is under way: call start before stop")
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
        window, self._window = self._window, None
        _wait_for_devices()
        window.sample()
        note = "; ".join(filter(None, [self._meter.note(), *window.failures()]))
        components = window.components(self._idle)
        self._use = EnergyUse(window.seconds, components, window.samples, self._g_per_kwh, self._pue, note)
        return self._use

    def sample(self) -> None:
        """Reads the meter once, inside a block."""
        if self._window is None:
            raise InputError("no energy measurement is under way: call start before sample")
        self._window.sample()

    def _poll(self) -> None:
        window = self._window
        while window is not None and not self._ended.wait(self._interval):
            window.sample()

    def _idle_watts(self, channels: Sequence[Channel]) -> dict[str, float]:
        _wait_for_devices()
        window = _Window(channels, self._clock)
        until, interval = window.started + self._idle_seconds, self._interval or self._idle_seconds / FEW_SAMPLES
        while (left := until - self._clock()) > 0:
            self._sleep(min(interval, left))
            window.sample()
        return {each.component: each.joules / window.seconds for each in window.components({})}

    @property
    def use(self) -> EnergyUse:
        """What the last block used."""
        if self._use is None:
            raise InputError("nothing was measured yet: use is known after the block has ended")
        return self._use

    @property
    def joules(self) -> float:
        """The last block's joules, idle power included."""
        return self.use.joules

    def __enter__(self) -> Energy:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._window is not None:
            self.stop()


def _wait_for_devices() -> None:
    """Waits for the GPUs that this process has used; waiting for another one would make it take memory there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            if index == torch.cuda.current_device() or torch.cuda.memory_reserved(index):
                torch.cuda.synchronize(index)
