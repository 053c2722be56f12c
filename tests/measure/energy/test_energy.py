"""Integrals against their closed forms, counters that start again, and what is said where nothing can be measured."""

import json
import logging
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.energy.energy import Energy, Integral
from batchlab.measure.energy.energy_meters import Channel, MachineMeter
from batchlab.measure.energy.energy_use import ComponentEnergy, EnergyUse


class Bench:
    """A machine in simulated time: power(t) in watts for each component, read as power or as a counter of `unit` J."""

    def __init__(self, power, *, kind="watts", source="sampled", unit=1.0, wraps_at=None, start=0):
        self.power, self.now = power, 0.0
        self.kind, self.source, self.unit, self.wraps_at, self.start = kind, source, unit, wraps_at, start
        self.energy = dict.fromkeys(power, 0.0)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        for name, power in self.power.items():
            self.energy[name] += seconds * power(self.now + seconds / 2)
        self.now += seconds

    def channels(self):
        return [
            Channel(name, self.kind, self.source, self._read(name), self.unit, self.wraps_at) for name in self.power
        ]

    def _read(self, name):
        if self.kind == "watts":
            return lambda: self.power[name](self.now) / self.unit
        turn = self.wraps_at or math.inf
        return lambda: (self.start + round(self.energy[name] / self.unit)) % turn

    def note(self):
        return ""

    def energy_of(self, **options):
        return Energy(self, interval=None, clock=self.clock, sleep=self.sleep, **options)


def test_a_known_power_trace_read_at_irregular_times_gives_its_integral():
    bench = Bench({"gpu": lambda t: 100 + 50 * math.sin(t)})
    gaps = torch.rand(400, generator=torch.Generator().manual_seed(0)).mul(0.4).add(0.05).tolist()
    with bench.energy_of() as energy:
        for gap in gaps:
            bench.sleep(gap)
            energy.sample()
    seconds = sum(gaps)
    exact = 100 * seconds + 50 * (1 - math.cos(seconds))
    assert energy.use.seconds == pytest.approx(seconds)
    assert energy.joules == pytest.approx(exact, rel=5e-4)
    assert energy.use.samples == 402 and not energy.use.few_samples


def test_units_are_those_of_physics():
    bench = Bench({"cpu": lambda t: 60.0})
    with bench.energy_of(g_per_kwh=400.0) as energy:
        bench.sleep(60)
    assert energy.joules == 3600.0 and energy.use.kwh * 1000 == 1.0 and energy.use.mean_watts == 60.0
    whole = EnergyUse(3600.0, (ComponentEnergy("cpu", 3.6e6, "counter"),), 2, 400.0)
    assert whole.kg_co2e == 0.4
    assert EnergyUse(3600.0, whole.components, 2, 400.0, pue=1.5).kg_co2e == pytest.approx(0.6, rel=1e-15)


def test_no_country_is_guessed():
    bench = Bench({"cpu": lambda t: 60.0})
    with bench.energy_of() as energy:
        bench.sleep(60)
    assert energy.use.kg_co2e is None and energy.use.g_per_kwh is None


@given(
    counts=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    start=st.integers(0, 2**32 - 1),
    turn=st.sampled_from([2**32, 262_143_328_850 // 7]),
)
def test_a_counter_that_starts_again_is_followed_exactly(counts, start, turn):
    steps = [count % turn for count in counts]
    integral, now = Integral(Channel("cpu", "joules", "counter", lambda: 0, 1e-6, turn)), start % turn
    integral.add(0.0, now)
    for place, step in enumerate(steps):
        now = (now + step) % turn
        integral.add(place + 1.0, now)
    assert integral._total == sum(steps) and integral.joules == sum(steps) * 1e-6


def test_a_counter_wraps_within_a_block():
    bench = Bench(
        {"cpu": lambda t: 100.0}, kind="joules", source="counter", unit=1e-6, wraps_at=2**32, start=2**32 - 10
    )
    with bench.energy_of() as energy:
        for _ in range(200):
            bench.sleep(1.0)
            energy.sample()
    assert energy.joules == pytest.approx(20_000.0, rel=1e-15)


def test_a_counter_that_falls_for_no_known_reason_gives_no_number():
    readings = iter([100.0, 150.0, 20.0])
    energy = Energy(_Given([Channel("gpu", "joules", "counter", lambda: next(readings))]), interval=None)
    with energy:
        energy.sample()
    assert math.isnan(energy.joules)


class _Given:
    def __init__(self, channels):
        self._channels = channels

    def channels(self):
        return self._channels

    def note(self):
        return "as given"


def test_net_is_gross_less_idle():
    bench = Bench({"gpu": lambda t: 50.0 if t <= 10 else 250.0, "cpu": lambda t: 20.0})
    with bench.energy_of(idle_seconds=10.0) as energy:
        bench.sleep(1e-6)
        energy.sample()
        bench.sleep(30.0)
    use = energy.use
    assert [part.idle_watts for part in use.components] == [pytest.approx(50.0), pytest.approx(20.0)]
    assert use.joules == pytest.approx(270 * 30, rel=1e-6)
    assert use.net_joules == pytest.approx(200 * 30, rel=1e-6)


def test_a_block_that_does_nothing_has_no_net_energy_beyond_the_noise():
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    bench = Bench({"gpu": lambda t: 50.0 + 0.5 * noise[int(t * 10)].item()})
    with bench.energy_of(idle_seconds=100.0) as energy:
        for _ in range(1000):
            bench.sleep(0.1)
            energy.sample()
    standard_error = 0.5 * math.sqrt(1 / 20 + 1 / 1000) * energy.use.seconds  # 21 idle readings
    assert abs(energy.use.net_joules) < 4 * standard_error < 0.01 * energy.joules


def test_net_is_unknown_without_an_idle_measurement():
    bench = Bench({"cpu": lambda t: 20.0})
    with bench.energy_of() as energy:
        bench.sleep(1.0)
    assert energy.use.net_joules is None
    with pytest.raises(InputError, match="net energy needs the idle power: measure with Energy.idle_seconds=...."):
        energy.use.per(steps=1, net=True)


def test_energy_for_what_was_done():
    use = EnergyUse(10.0, (ComponentEnergy("gpu", 1000.0, "counter", 40.0),), 21)
    rate = use.per(steps=100, examples=6400, progress=0.5)
    assert (rate.joules_per_step, rate.joules_per_example, rate.joules_per_progress) == (10.0, 0.15625, 2000.0)
    assert use.per(steps=100, net=True).joules_per_step == 6.0
    assert use.per().joules_per_step is None
    assert math.isnan(use.per(progress=0.0).joules_per_progress)
    assert math.isnan(use.per(progress=-1.0).joules_per_progress)
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match="steps must be finite and > 0"):
            use.per(steps=bad)


def test_components_keep_their_sources_and_two_devices_of_one_kind_are_added():
    channels = [
        Channel("gpu", "watts", "sampled", lambda: 100.0),
        Channel("gpu", "joules", "counter", lambda: 7.0),
        Channel("ram", "watts", "estimated", lambda: 10.0),
    ]
    ticks = iter(range(1000))
    with Energy(_Given(channels), interval=None, clock=lambda: float(next(ticks))) as energy:
        pass
    assert [(c.component, c.source) for c in energy.use.components] == [("gpu", "sampled"), ("ram", "estimated")]
    assert energy.use.source == "mixed" and energy.use.note == "as given"
    assert energy.use.few_samples and energy.use.samples == 2
    with pytest.raises(InputError, match="component must be one of .*'gpu', 'ram'.*, got 'dram'"):
        energy.use.component("dram")


def test_a_thread_reads_while_the_block_runs_and_ends_with_it():
    import threading
    import time

    with Energy(_Given([Channel("cpu", "watts", "estimated", lambda: 5.0)]), interval=0.005) as energy:
        time.sleep(0.3)
    assert energy.use.samples > 10  # 60 on a free machine
    assert energy.joules == pytest.approx(5 * energy.use.seconds, rel=0.01)
    assert not [each for each in threading.enumerate() if each.name == "batchlab-energy"]


def test_an_exception_in_the_block_passes_and_the_thread_ends():
    import threading

    energy = Energy(_Given([Channel("cpu", "watts", "estimated", lambda: 5.0)]), interval=0.01)
    with pytest.raises(ZeroDivisionError), energy:
        1 / 0  # noqa: B018
    assert energy.use.seconds > 0
    assert not [each for each in threading.enumerate() if each.name == "batchlab-energy"]


def test_a_meter_that_fails_makes_the_number_unknown_and_says_why():
    def fail():
        raise OSError("device lost")

    channels = [Channel("gpu", "watts", "sampled", fail), Channel("cpu", "watts", "sampled", lambda: 5.0)]
    with Energy(_Given(channels), interval=None) as energy:
        pass
    assert math.isnan(energy.joules) and math.isnan(energy.use.component("gpu").joules)
    assert not math.isnan(energy.use.component("cpu").joules)
    assert energy.use.note == "as given; gpu failed: OSError: device lost"


def test_one_object_measures_block_after_block():
    bench = Bench({"cpu": lambda t: 10.0}, kind="joules", source="counter", start=1000)
    energy = bench.energy_of()
    with energy:
        bench.sleep(5)
    first = energy.use
    energy.start()
    with pytest.raises(InputError, match="nothing was measured yet"):
        energy.use  # noqa: B018
    bench.sleep(7)
    assert energy.stop().joules == 70.0 and first.joules == 50.0 and energy.use.source == "counter"


def test_a_block_may_be_ended_before_its_last_line():
    bench = Bench({"cpu": lambda t: 10.0})
    with bench.energy_of() as energy:
        bench.sleep(5)
        energy.stop()
        bench.sleep(5)
    assert energy.joules == 50.0


def test_json_both_ways():
    bench = Bench({"cpu": lambda t: 10.0, "gpu": lambda t: math.nan})
    with bench.energy_of(idle_seconds=2.0, g_per_kwh=300.0, pue=1.2) as energy:
        bench.sleep(5)
    again = EnergyUse.from_json(energy.use.to_json())
    assert json.loads(again.to_json()) == json.loads(energy.use.to_json())
    assert again.component("cpu") == energy.use.component("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"g_per_kwh": -1.0}, "g_per_kwh must be finite and >= 0, or None, got -1.0"),
        ({"g_per_kwh": math.nan}, "g_per_kwh must be finite"),
        ({"pue": 0.9}, "pue must be finite and >= 1, got 0.9"),
        ({"idle_seconds": -1.0}, "idle_seconds must be finite and >= 0, got -1.0"),
        ({"interval": 0.0}, "interval must be finite and > 0, or None, got 0.0"),
        ({"gpus": [0]}, r"gpus is for the default meter, which was replaced; got gpus=\[0\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Energy(_Given([]), **options)


def test_wrong_use_is_named():
    energy = Energy(_Given([]), interval=None)
    with pytest.raises(InputError, match="the meter has no channel"):
        energy.start()
    energy = Energy(_Given([Channel("cpu", "watts", "sampled", lambda: 1.0)]), interval=None)
    for call in (energy.stop, energy.sample):
        with pytest.raises(InputError, match="no energy measurement is under way"):
            call()
    energy.start()
    with pytest.raises(InputError, match="call stop before start"):
        energy.start()
    with pytest.raises(InputError, match="a channel's kind must be one of"):
        Channel("cpu", "volts", "counter", lambda: 0.0)
    with pytest.raises(InputError, match="a channel's unit and wraps_at must be > 0"):
        Channel("cpu", "watts", "counter", lambda: 0.0, wraps_at=0)
    with pytest.raises(InputError, match="tdp_watts must be finite and > 0, got 0"):
        MachineMeter(tdp_watts=0)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.delitem(sys.modules, "zeus.device", raising=False)
    with pytest.raises(InputError, match=r'measuring energy needs the extra: pip install "batchlab\[energy\]"'):
        Energy()


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """Zeus's own code over files such as the kernel's: one package with memory, and psys, which holds both."""
    import zeus.device.cpu
    from zeus.device.cpu import rapl as module

    def zone(path, name, count, turn=262_143_328_850):
        path.mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        (path / "energy_uj").write_text(f"{count}\n")
        (path / "max_energy_range_uj").write_text(f"{turn}\n")
        return path / "energy_uj"

    root = tmp_path / "intel-rapl"
    files = {
        "cpu": zone(root / "intel-rapl:0", "package-0", 262_143_000_000),
        "core": zone(root / "intel-rapl:0" / "intel-rapl:0:0", "core", 5),
        "ram": zone(root / "intel-rapl:0" / "intel-rapl:0:1", "dram", 1_000_000),
        "psys": zone(root / "intel-rapl:1", "psys", 10),
    }
    monkeypatch.setattr(module, "RAPL_DIR", str(root))
    monkeypatch.setattr(zeus.device.cpu, "_cpus", None)
    module.rapl_is_available.cache_clear()
    yield files
    module.rapl_is_available.cache_clear()


def test_rapl_counters_are_read_through_zeus_without_psys_and_past_their_turn(rapl):
    with Energy(interval=None) as energy:
        rapl["cpu"].write_text("4000000\n")
        rapl["ram"].write_text("3500000\n")
        rapl["psys"].write_text("90000000\n")
        rapl["core"].write_text("90000000\n")
    use = energy.use
    assert [(c.component, c.source) for c in use.components] == [("cpu", "counter"), ("ram", "counter")]
    assert use.component("cpu").joules == pytest.approx(4.0 + 0.328850, abs=1e-9)
    assert use.component("ram").joules == pytest.approx(2.5, abs=1e-12)


class _Gpus:
    """Two GPUs as Zeus shows them, the second older than Volta."""

    millijoules = 1000

    def __len__(self):
        return 2

    def supports_get_total_energy_consumption(self, index):
        return index == 0

    def get_total_energy_consumption(self, index):
        assert index == 0
        _Gpus.millijoules += 2500
        return self.millijoules

    def get_instant_power_usage(self, index):
        assert index == 1
        return 80_000


def test_gpus_by_counter_or_by_power_and_which_ones(monkeypatch):
    import zeus.device

    monkeypatch.setattr(zeus.device, "get_gpus", _Gpus)
    with Energy(interval=None, gpus=[0]) as energy:
        pass
    assert energy.use.component("gpu").joules == pytest.approx(2.5) and energy.use.component("gpu").source == "counter"
    with Energy(interval=None, gpus=[1]) as energy:
        pass
    assert energy.use.component("gpu").joules == pytest.approx(80 * energy.use.seconds, rel=0.2)
    assert energy.use.component("gpu").source == "sampled"
    with pytest.raises(InputError, match=r"gpus must be indices of the 2 GPUs that can be metered, got \[2\]"):
        Energy(interval=None, gpus=[2]).start()


def test_a_gpu_in_use_that_cannot_be_metered_leaves_the_sum_unknown(monkeypatch):
    import zeus.device

    def refuse():
        raise RuntimeError("MIG slices have no counter\nmore")

    monkeypatch.setattr(zeus.device, "get_gpus", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    meter = MachineMeter()
    energies = {channel.component: channel.read() for channel in meter.channels()}
    assert math.isnan(energies["gpu"]) and not math.isnan(energies["cpu"])
    assert "gpu not metered: MIG slices have no counter" in meter.note()


def test_what_the_models_assume_can_be_given():
    meter = MachineMeter(gpus=[], tdp_watts=100.0, ram_watts=3.0)
    channels = {channel.component: channel for channel in meter.channels()}
    assert channels["ram"].read() == 3.0
    assert "ram estimated as 3 W given" in meter.note()
    if channels["cpu"].source == "estimated":
        assert "cpu estimated from its load and 100 W given" in meter.note()


QUIET = """
import logging, socket, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
def refuse(*arguments, **options): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from batchlab.measure.energy.energy import Energy
with Energy(interval=0.02, idle_seconds=0.1) as energy:
    sum(i * i for i in range(3_000_000))
for part in energy.use.components:
    assert part.joules > 0 and part.idle_watts > 0, part
sys.stderr.write(energy.use.source)
"""


def test_the_fallback_works_offline_in_silence_and_writes_nothing(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", QUIET], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    noise = [line for line in ran.stdout.splitlines() if "zeus" in line or "codecarbon" in line or "amd" in line]
    assert noise == []
    assert ran.stderr in ("estimated", "mixed", "counter")
    assert list(tmp_path.rglob("*.csv")) == [] and not [path for path in tmp_path.iterdir() if path.is_file()]


def test_the_packages_loggers_are_left_as_they_were():
    MachineMeter(gpus=[]).channels()
    assert not any(logging.getLogger(name).filters for name in ("zeus", "codecarbon"))


def _work(device):
    x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    for _ in range(20):
        for _ in range(100):
            x = (x @ x).clamp(-1, 1)
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads a GPU's counter")
def test_a_real_gpu_is_read_by_its_counter(accelerator):
    pytest.importorskip("zeus")
    with Energy(interval=0.05, gpus=[0], idle_seconds=0.5) as energy:
        _work(accelerator)
    gpu = energy.use.component("gpu")
    assert gpu.source == "counter" and gpu.idle_watts > 5 and 5 < gpu.joules / energy.use.seconds < 1500


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads a GPU's counter")
def test_a_meter_of_ones_own_reads_the_driver_and_its_power_agrees_with_its_counter(accelerator):
    """The same window by the energy counter and by the trapezoid rule over the sensor: the counter lags by 0.1 s."""
    driver = pytest.importorskip("pynvml")
    driver.nvmlInit()
    chip = driver.nvmlDeviceGetHandleByIndex(0)

    class Driver:
        def channels(self):
            return [
                Channel("gpu", "joules", "counter", lambda: driver.nvmlDeviceGetTotalEnergyConsumption(chip), 1e-3),
                Channel("sensor", "watts", "sampled", lambda: driver.nvmlDeviceGetPowerUsage(chip), 1e-3),
            ]

        def note(self):
            return ""

    try:
        with Energy(Driver(), interval=0.02) as energy:
            _work(accelerator)
            time.sleep(1.0)
        counted, sampled = (energy.use.component(name) for name in ("gpu", "sensor"))
    finally:
        driver.nvmlShutdown()
    assert counted.source == "counter" and sampled.source == "sampled" and energy.use.samples > 10
    assert 5 < counted.joules / energy.use.seconds < 1500
    assert 0.3 < counted.joules / sampled.joules < 3


@pytest.mark.gpu
def test_without_the_packages_the_default_meter_names_the_extra(accelerator, monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    with pytest.raises(InputError, match=r"pip install \"batchlab\[energy\]\""):
        Energy()
