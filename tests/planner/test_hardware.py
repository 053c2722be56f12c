"""The packaged figures against the data sheets, a user's file over them, and what is refused."""

import math

import pytest

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, Device, hardware

DEVICE = """
[device.X1]
memory = "10 GB"
peak = "2 PFLOP/s"
memory_bandwidth = "1.5 TB/s"
link_bandwidth = "200 Gbit/s"
devices_per_node = 4
power = "0.5 kW"
source = "a sheet"
as_of = 2025-01-31
"""


def _write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_published_figures():
    devices = hardware()
    expected = {
        "A100-40": (40, 312, 1555, 300, 400),
        "A100-80": (80, 312, 2039, 300, 400),
        "H100-80": (80, 989.4, 3350, 450, 700),
        "H200-141": (141, 989.4, 4800, 450, 700),
        "B200-180": (180, 2250, 8000, 900, 1000),
        "A40": (48, 149.7, 696, 32, 300),
        "L4": (24, 121, 300, 32, 72),
        "A10G": (24, 70, 600, 32, 300),
        "T4": (16, 65, 320, 16, 70),
        "V100-16": (16, 125, 900, 150, 300),
        "V100-32": (32, 125, 900, 150, 300),
        "RTX-4090": (24, 165.2, 1008, 32, 450),
        "MI300X": (192, 1307.4, 5300, 448, 750),
    }
    assert set(devices) == set(expected)
    for name, (gib, tflops, bandwidth, link, watts) in expected.items():
        device = devices[name]
        assert device.name == name and device.source and device.as_of == "2026-11-26"
        assert device.memory_bytes == gib * 2**30
        assert device.peak_flops == pytest.approx(tflops * 1e12, rel=1e-12)
        assert device.memory_bandwidth == bandwidth * 1e9
        assert device.link_bandwidth == link * 1e9
        assert (device.devices_per_node, device.watts) == (8, watts)
        assert device.peak_format == ("float16" if name[:2] in ("T4", "V1") else "bfloat16")


def test_prices_are_dated():
    """The prices that sheet 61 carries, of its paper's table and of its code."""
    priced = {d.name: d.price_per_hour for d in hardware().values() if d.price_per_hour is not None}
    assert priced == {
        "A40": 0.79,
        "A100-80": 1.67,
        "H100-80": 2.1,
        "A100-40": 4.097,
        "V100-16": 3.06,
        "L4": 0.8048,
        "A10G": 1.006,
        "T4": 0.526,
    }
    for name in priced:
        assert hardware()[name].price_as_of == "2024-08-08" and "2408.04693" in hardware()[name].price_source


def test_a_users_file_wins(tmp_path):
    text = DEVICE + DEVICE.replace("X1", "A40") + '[price.A40]\nusd_per_hour = 3\nsource = "bill"\nas_of = 2026-02-01\n'
    devices = hardware(_write(tmp_path, text))
    new = devices["X1"]
    assert (new.memory_bytes, new.peak_flops, new.memory_bandwidth) == (10e9, 2e15, 1.5e12)
    assert (new.link_bandwidth, new.watts, new.as_of, new.price_per_hour) == (25e9, 500.0, "2025-01-31", None)
    assert (devices["A40"].memory_bytes, devices["A40"].price_per_hour) == (10e9, 3.0)
    assert devices["A40"].price_as_of == "2026-02-01"
    assert devices["A100-80"] == hardware()["A100-80"]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("memory =", "memroy =", r"mine.toml: device 'X1' has no key 'memroy'; its keys are \['memory', 'peak'"),
        ('source = "a sheet"\n', "", "mine.toml: device 'X1' lacks the key 'source'"),
        ('"10 GB"', "10", "device 'X1' memory must be a number and one of the units .'GiB', .* got 10"),
        ('"10 GB"', '"10"', "device 'X1' memory must be a number and one of the units .* got '10'"),
        ('"2 PFLOP/s"', '"2 PFLOPS"', "device 'X1' peak must be a number and one of the units .* got '2 PFLOPS'"),
        ('"10 GB"', '"-10 GB"', "device 'X1' memory must be finite and > 0, got '-10 GB'"),
        ('"10 GB"', '"nan GB"', "device 'X1' memory must be finite and > 0, got 'nan GB'"),
        ('"10 GB"', '"ten GB"', "device 'X1' memory must be finite and > 0, got 'ten GB'"),
        ("node = 4", 'node = 4\npeak_format = "fp8"', r"device 'X1' peak_format must be one of .* got 'fp8'"),
        (
            "node = 4",
            'node = 4\npeak_format = ["float16"]',
            r"peak_format must be one of .* got \['float16'\]",
        ),
        ("node = 4", "node = 0", "device 'X1' devices_per_node must be an integer of at least 1, got 0"),
        ("node = 4", "node = true", "device 'X1' devices_per_node must be an integer of at least 1, got True"),
        ("2025-01-31", '"soon"', "device 'X1' as_of must be a date, as in 2026-11-26, got 'soon'"),
        ('"a sheet"', '""', "device 'X1' source must be a text that names the document, got ''"),
        ("[device.X1]", "[devices.X1]", r"tables must be \[device.NAME\] or \[price.NAME\], got \[devices\]"),
        ("[device.X1]", "[[device]]", r"mine.toml: devices must be tables \[device.NAME\]"),
        ("memory", "memory memory", "cannot be read as TOML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, old, new, text):
    with pytest.raises(InputError, match=text):
        hardware(_write(tmp_path, DEVICE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("usd_per_hour = -1", "price 'L4' usd_per_hour must be a number > 0, got -1"),
        ('usd_per_hour = "1 USD"', "price 'L4' usd_per_hour must be a number > 0, got '1 USD'"),
        ("dollars = 1", "price 'L4' has no key 'dollars'"),
    ],
)
def test_a_bad_price_is_refused(tmp_path, line, text):
    with pytest.raises(InputError, match=text):
        hardware(_write(tmp_path, f'[price.L4]\n{line}\nsource = "s"\nas_of = 2026-01-01\n'))
    with pytest.raises(InputError, match="price 'Z9' is of no known device"):
        hardware(_write(tmp_path, '[price.Z9]\nusd_per_hour = 1\nsource = "s"\nas_of = 2026-01-01\n'))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="absent.toml cannot be read as TOML"):
        hardware(tmp_path / "absent.toml")


def test_clusters_are_whole_nodes():
    a100 = hardware()["A100-80"]
    assert [(Cluster(n, a100).nodes, Cluster(n, a100).node_size) for n in (1, 4, 8, 64)] == [
        (1, 1),
        (1, 4),
        (1, 8),
        (8, 8),
    ]
    with pytest.raises(InputError, match="devices must be at most 8 or a multiple of it .* got 12"):
        Cluster(12, a100)
    with pytest.raises(InputError, match="devices must be an integer of at least 1, got 0"):
        Cluster(0, a100)
    with pytest.raises(InputError, match="device must be a Device"):
        Cluster(8, "A100-80")
    with pytest.raises(InputError, match="inter_node_bandwidth must be finite and > 0, got nan"):
        Cluster(8, a100, inter_node_bandwidth=math.nan)
    assert Cluster.from_json(Cluster(64, a100).to_json()) == Cluster(64, a100)


def test_a_price_needs_its_date():
    good = dict(memory_bytes=1.0, peak_flops=1.0, memory_bandwidth=1.0, link_bandwidth=1.0, devices_per_node=1)
    with pytest.raises(InputError, match="price_as_of must say the date of price_per_hour 2.0, got none"):
        Device("d", **good, watts=1.0, source="s", as_of="2026-01-01", price_per_hour=2.0)
    with pytest.raises(InputError, match=r"peak_format must be one of \['bfloat16', 'float16'\], got 'float32'"):
        Device("d", **good, watts=1.0, source="s", as_of="2026-01-01", peak_format="float32")
    with pytest.raises(InputError, match="watts must be finite and > 0, got -1.0"):
        Device("d", **good, watts=-1.0, source="s", as_of="2026-01-01")
