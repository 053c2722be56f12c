"""Claim: `import batchlab`, and all that it needs, adds under 100 ms to `import torch`.

Each repeat is a fresh interpreter that imports torch, then batchlab, and reads the clock between; pairs, so that a busy
machine slows both. The second figure also touches every public name (`batchlab.tune` and the rest are loaded when they
are first used), for what a script that uses them all pays at its first line.
"""

import argparse
import os
import statistics
import subprocess
import sys

from _paired import report

CODE = """
import time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import batchlab
face_done = time.perf_counter()
for name in batchlab.__all__:
    getattr(batchlab, name)
print(torch_done - start, face_done - torch_done, time.perf_counter() - face_done)
"""


def main() -> None:
    """Prints the medians with their spread, and the ratio to torch's own import, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/import_time.json")
    given = parser.parse_args()
    repeats = given.repeats
    runs = [sample() for _ in range(repeats + 1)][1:]  # the first fills the page cache
    torch_s, face_s, names_s = (sorted(column) for column in zip(*runs, strict=True))
    rows = []
    for name, seconds in (("import torch", torch_s), ("import batchlab", face_s), ("all public names", names_s)):
        row = {"what": name, "median_ms": 1e3 * statistics.median(seconds)}
        rows.append(row | {"least_ms": 1e3 * seconds[0], "most_ms": 1e3 * seconds[-1], "repeats": repeats})
        print(f"{name:17} {row['median_ms']:8.1f} ms [{rows[-1]['least_ms']:.1f}, {rows[-1]['most_ms']:.1f}]")
    rows[1]["holds"] = rows[1]["median_ms"] < 100
    ratio = statistics.median(face / torch for torch, face, _ in runs)
    print(f"batchlab/torch {ratio:.4f}, {os.cpu_count()} cores, {repeats} fresh interpreters")
    report("import_time", (__doc__ or "").splitlines()[0], rows, save=given.save)


def sample() -> tuple[float, ...]:
    """Seconds of `import torch`, of `import batchlab` after it, and of loading every public name after that."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


if __name__ == "__main__":
    main()
