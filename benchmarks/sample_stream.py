"""Claim: a place of the sample stream costs as much at 10^10 examples as at 10^4; torch.randperm grows with n.

Seconds and bytes to give 64 indices from the middle of an epoch far ahead: `SampleStream` against `torch.randperm(n)`
with a seeded generator, of which the 64 are then cut. torch's stops at 10^8 examples (0.8 GB); the row beyond states
the bytes that it would take. Processor seconds, in turn; the ratio is theirs to ours. The stream's cost moves with n's
place between two powers of four, for indices beyond n are permuted again: 10^4 and 10^10 fill 0.61 and 0.58 of theirs,
10^6 fills 0.95 and 10^8 0.37. Whole epochs in order are measured too, where randperm is the faster one.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from _paired import arguments, median_ratio, paired_seconds, report

from batchlab.data.stream import SampleStream

SIZES = (10**4, 10**6, 10**8, 10**10)
TORCHS_LAST = 10**8


def ours(n: int) -> Callable[[], Any]:
    """A fresh stream each time, in the thousandth epoch."""
    return lambda: SampleStream(n, 0).indices(1000 * n + n // 2, 64)


def torchs(n: int) -> Callable[[], Any]:
    """The permutation of the epoch, and the slice."""
    return lambda: torch.randperm(n, generator=torch.Generator().manual_seed(0))[n // 2 : n // 2 + 64].tolist()


def peak(make: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy hold meanwhile; torch's are not seen."""
    tracemalloc.start()
    make()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def in_order(n: int, batch: int = 256) -> float:
    """Processor nanoseconds an index, through a million positions, batch by batch."""
    stream, count = SampleStream(n, 1), 10**6
    start = time.process_time()
    for at in range(0, count, batch):
        stream.indices(at, batch)
    return (time.process_time() - start) / count * 1e9


def main() -> None:
    """Prints a row for each size, and one JSON object."""
    given = arguments(__doc__, pairs=15)
    torch.set_num_threads(1)
    rows = []
    for n in SIZES:
        row: dict[str, Any] = {"n": n, "seek_bytes": peak(ours(n)), "randperm_bytes": 8 * n}
        if n <= TORCHS_LAST:
            pairs = paired_seconds(torchs(n), ours(n), pairs=given.pairs, warm_up=1, clock=time.process_time)
            row |= {"seek_seconds": statistics.median(pair[1] for pair in pairs), **median_ratio(pairs)}
            row |= {"randperm_seconds": statistics.median(pair[0] for pair in pairs)}
        else:
            pairs = paired_seconds(ours(n), ours(n), pairs=given.pairs, warm_up=1, clock=time.process_time)
            row["seek_seconds"] = statistics.median(pair[1] for pair in pairs)
        row["nanoseconds_an_index_in_order"] = statistics.median(in_order(n) for _ in range(3))
        if n <= TORCHS_LAST:
            row["randperm_nanoseconds_an_index"] = row["randperm_seconds"] / n * 1e9
        rows.append(row)
        print(f"n {n:.0e}: seek {row['seek_seconds'] * 1e6:.0f} us, {row['seek_bytes'] / 1024:.0f} KiB;", end=" ")
        print(f"randperm/stream {row.get('ratio', float('nan')):.3g}, {8 * n / 1024:.3g} KiB;", end=" ")
        print(f"in order {row['nanoseconds_an_index_in_order']:.0f} ns an index,", end=" ")
        print(f"randperm {row.get('randperm_nanoseconds_an_index', float('nan')):.0f} ns", flush=True)
    flat = {what: rows[-1][what] / rows[0][what] for what in ("seek_seconds", "seek_bytes")}
    print(f"10^10 over 10^4: seconds {flat['seek_seconds']:.2f}, bytes {flat['seek_bytes']:.2f}", end=": ")
    print("holds" if max(flat.values()) <= 1.5 else "FAILS")
    report("sample_stream", (__doc__ or "").splitlines()[0], [*rows, {"of_10^10_to_10^4": flat}], save=given.save)


if __name__ == "__main__":
    main()
