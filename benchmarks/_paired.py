"""What the benchmarks share: interleaved pairs, the median of their ratios with a bootstrap interval, the machine."""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from batchlab.core.provenance import machine, versions

RESULTS = Path(__file__).parent / "results"
# What is freed goes back at once, and all threads share one arena: the peak of one process after another is then the
# same to 0.05 %, where the C library's own choices scatter it by 2 %.
FREED_AT_ONCE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def paired_seconds(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    pairs: int,
    warm_up: int = 5,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Seconds of `ours` and `theirs` in turn, each the sum of `calls` calls; who goes first alternates within a pair.

    Within a pair the calls alternate one by one, so that what else the machine does hits both sides alike. clock:
    `time.process_time` counts the processor's seconds of this process alone, for a machine that others use too.
    """
    result = []
    for index in range(-warm_up, pairs):
        spent = [0.0, 0.0]
        for call in range(calls):
            order = (0, 1) if (index + call) % 2 else (1, 0)
            for side in order:
                start = clock()
                (ours, theirs)[side]()
                spent[side] += clock() - start
        if index >= 0:
            result.append((spent[0], spent[1]))
    return result


def peak_bytes(make: Callable[[], Any] | None, *, threads: int, steps: int = 10) -> int:
    """The peak memory of a fresh process that makes a side and calls its `step` ten times; of its imports for None.

    Linux alone. make: can be pickled.
    """
    os.environ.update(FREED_AT_ONCE)  # read by the C library as the child begins; this process has long begun
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, threads, steps))


def _peak(make: Callable[[], Any] | None, threads: int, steps: int) -> int:
    torch.set_num_threads(threads)
    side = None if make is None else make()
    for _ in range(steps if side else 0):
        side.step()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def median_ratio(pairs: Sequence[tuple[float, float]], *, resamples: int = 4000, seed: int = 0) -> dict[str, float]:
    """The median of ours/theirs over pairs, with its bootstrap 95 % interval."""
    ratios = [ours / theirs for ours, theirs in pairs]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def arguments(description: str | None, *, pairs: int, only: str = "") -> argparse.Namespace:
    """--pairs, --threads, --device, --processor-time and --save, for every benchmark of pairs; --only where `only` says
    what.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--device", default="cpu", help="where it runs, if the benchmark can on another; results apart")
    parser.add_argument("--processor-time", action="store_true", help="not wall time: for a busy machine, one thread")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    if only:
        parser.add_argument("--only", default="", help=f"{only} with this in its name; the others' rows are kept")
    return parser.parse_args()


def clock_of(given: argparse.Namespace) -> Callable[[], float]:
    """The seconds of what was asked for; of a GPU when all work given to it is done."""
    if not given.device.startswith("cuda"):
        return time.process_time if given.processor_time else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(given.device)
        return time.perf_counter()

    return clock


def name_of(name: str, given: argparse.Namespace) -> str:
    """Of the results: those of another device than the CPU have a file of their own."""
    return name if given.device == "cpu" else f"{name}_gpu"


def report(name: str, claim: str, rows: Sequence[dict[str, Any]], *, save: bool) -> None:
    """Prints one JSON object: the claim, the rows, versions and machine; also into results/NAME.json if asked."""
    found = result(name, claim, rows)
    if save:
        write(found)
    print(json.dumps(found | {"rows": [{k: v for k, v in row.items() if k != "pairs"} for row in rows]}))


def result(name: str, claim: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With the versions of what was measured and the machine that it was measured on."""
    return {"benchmark": name, "claim": claim, "rows": list(rows), "versions": versions(), "machine": machine()}


def kept(name: str, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The committed rows to keep, if they were measured on this machine with these versions."""
    file, now = RESULTS / f"{name}.json", result(name, "", [])
    before = json.loads(file.read_text("utf-8")) if file.exists() else now
    same = all(json.loads(json.dumps(now[key])) == before[key] for key in ("machine", "versions"))
    return [row for row in before["rows"] if keep(row)] if same else []


def write(found: dict[str, Any]) -> None:
    """Into results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{found['benchmark']}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
