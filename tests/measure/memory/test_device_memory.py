"""Memory by the kernel's own counters, against allocations of a known size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchlab.measure.memory import device_memory
from batchlab.measure.memory.device_memory import CudaMeter, available_memory

MIB, BLOCK = 2**20, 40 * 2**20
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


PEAKS = """
import torch
from batchlab.measure.memory.device_memory import ProcessMeter, meter
gauge = meter(torch.device("cpu"))
assert isinstance(gauge, ProcessMeter)
for blocks in (1, 3, 1, 0):
    gauge.start()
    for _ in range(2):
        held = [torch.ones({block}, dtype=torch.uint8) for _ in range(blocks)]
        del held
    print(gauge.peak())
"""


@linux_only
def test_the_peak_is_what_was_held_at_once_since_the_start():
    """Blocks of 40 MiB are mapped afresh and given back at once; 10 MiB of other things may come or go meanwhile.

    In a process of its own: what earlier tests left to the garbage collector would be given back at any time.
    """
    ran = subprocess.run([sys.executable, "-c", PEAKS.format(block=BLOCK)], capture_output=True, text=True, check=True)
    peaks = ran.stdout.split()
    if "None" in peaks:
        pytest.skip("this system does not let a process reset its high-water mark")
    for blocks, peak in zip((1, 3, 1, 0), peaks, strict=True):
        assert abs(int(peak) - blocks * BLOCK) < BLOCK / 4


def _system():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@linux_only
def test_without_a_control_group_it_is_what_the_kernel_says(monkeypatch):
    monkeypatch.setattr(device_memory, "_CONTROL_GROUPS", ())
    before, found, after = _system(), available_memory(), _system()
    assert min(before, after) - 256 * MIB < found < max(before, after) + 256 * MIB  # others may take or free some


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        ("1000\n", "300\n", "anon 5\ninactive_file 40\n", 740),
        ("1000\n", "300\n", None, 700),
        ("1000\n", "1300\n", "inactive_file 40\n", 0),
        ("max\n", "300\n", "inactive_file 40\n", None),
        ("1000\n", None, "inactive_file 40\n", None),
        (None, "300\n", None, None),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_cannot_be_reclaimed(tmp_path, monkeypatch, limit, used, stat, left):
    for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        device_memory, "_CONTROL_GROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),)
    )
    found = available_memory()
    assert found == left if left is not None else found > 64 * MIB


@pytest.mark.parametrize("lines", ["0::/jobs/7/step\n", "5:cpu:/other\n7:cpuset,memory:/jobs/7/step\n"])
def test_the_tightest_group_above_the_process_counts(tmp_path, monkeypatch, lines):
    left = {"": 900, "jobs": 800, "jobs/7": 300, "jobs/7/step": 700, "other": 1}
    for name, free in left.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "memory.max").write_text("1000\n")
        (tmp_path / name / "memory.current").write_text(f"{1000 - free}\n")
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(device_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(
        device_memory, "_CONTROL_GROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),)
    )
    assert available_memory() == 300


@pytest.mark.parametrize(("fraction", "usable"), [(1.0, 30 + 12 - 8), (0.25, 25 - 8)])
def test_a_gpu_gives_this_process_no_more_than_its_fraction(monkeypatch, fraction, usable):
    """Of 100 MiB 30 are free; the cache holds 12, of which 8 are in use."""
    counts = {"memory_allocated": 8 * MIB, "memory_reserved": 12 * MIB, "mem_get_info": (30 * MIB, 100 * MIB)}
    for name, count in (counts | {"get_per_process_memory_fraction": fraction, "current_device": 0}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, count=count: count)
    assert CudaMeter(torch.device("cuda")).usable == usable * MIB
