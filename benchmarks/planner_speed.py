"""Claim: an advice takes less than 0.3 s once it is imported, and a search over 10^6 layouts less than 10 s.

Seconds, not ratios: no peer answers either question. Each is the median of its calls in one process.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time

from _paired import report

from batchlab.planner import Cluster, ModelShape, Recipe, advise, layout, recipe
from batchlab.planner.hardware import hardware

SHAPE = ModelShape(layers=2520, hidden=5040, heads=2520, mlp=20160, vocabulary=32_000)  # 2520: many divisors


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/planner_speed.json")
    given = parser.parse_args()
    base = Recipe(256, 25_600_000, "adamw", 3e-4)
    cluster = Cluster(2520 * 6, dataclasses.replace(hardware()["A100-80"], devices_per_node=2520))
    found = None

    def search() -> None:
        nonlocal found
        found = layout(SHAPE, cluster, global_batch=2520 * 6 * 60, sequence_length=2520, uneven_stages=True)

    tasks = {
        "advise": (lambda: advise(params=7e9, tokens=3e11, learning_rate=3e-4, base_batch_tokens=5e5), 50),
        "recipe": (lambda: recipe(base, 8192, devices=64), 50),
        "layout": (search, 3),
    }
    rows = []
    for name, (call, count) in tasks.items():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rows.append({"task": name, "first_seconds": times[0], "median_seconds": statistics.median(times)})
    rows[-1]["layouts"] = found.considered
    code = "import time; t = time.perf_counter(); from batchlab.planner import advise; print(time.perf_counter() - t)"
    taken = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(5)
    ]
    rows.append({"task": "import advise", "first_seconds": taken[0], "median_seconds": statistics.median(taken)})
    report("planner_speed", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
