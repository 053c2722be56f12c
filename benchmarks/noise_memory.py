"""Claim: measuring the gradient noise scale takes at most 2 % of a training step's memory from micro-batches and ranks,
3 % from normalisation layers, and 10 % from single examples.

The same steps as in `noise_overhead.py`. A side's memory is the peak of a child process that takes ten steps, less that
of a child that takes none and has only made its imports; the ratio is the measured side's to the plain side's.
"""

from functools import partial
from typing import Any

from _paired import arguments, peak_bytes, report
from noise_overhead import METHODS, Side, alone_in_a_group, jobs

LIMITS = {"micro_batch": 1.02, "ranks": 1.02, "norm_layers": 1.03, "per_example": 1.10}


def main() -> None:
    """Prints a row for each model and method, and one JSON object."""
    given = arguments(__doc__, pairs=0)
    claim = " ".join((__doc__ or "").split("\n\n")[0].split())
    rows = []
    micro_batch = [(name, "micro_batch", pieces, None) for name in jobs() for pieces in (2, 4)]
    for ways in dict.fromkeys((*micro_batch, *METHODS)):
        rows.append(memory(*ways, threads=given.threads))
        print(_sentence(rows[-1]), flush=True)
    report("noise_memory", claim, rows, save=given.save)


def memory(name: str, method: str, pieces: int, projections: int | None, *, threads: int) -> dict[str, Any]:
    """The peaks of both sides, in bytes, and their ratio."""
    makes = [partial(side, name, method, pieces, projections, every) for every in (1, 0)]
    measured, plain, imports = (peak_bytes(make, threads=threads) for make in (*makes, imported))
    ratio = (measured - imports) / (plain - imports)
    row = {"model": name, "method": method, "micro_batches": pieces, "projections": projections, "memory_ratio": ratio}
    bytes_taken = {"measured_bytes": measured - imports, "plain_bytes": plain - imports}
    return row | {"holds": ratio <= LIMITS[method]} | bytes_taken


class Idle:
    """A side that does nothing."""

    def step(self) -> None:
        """Takes no memory."""


def imported() -> Idle:
    """In a process of its own: with the modules that an estimate imports, which are no part of a step."""
    from scipy import special, stats  # noqa: F401

    alone_in_a_group()
    return Idle()


def side(name: str, method: str, pieces: int, projections: int | None, every: int) -> Side:
    """In a process of its own."""
    imported()
    return Side(*jobs()[name], pieces, every=every, method=method, projections=projections)


def _sentence(row: dict[str, Any]) -> str:
    how = f"{row['method']}, {row['micro_batches']} micro-batches"
    how += f", {row['projections']} projections" if row["projections"] else ""
    return f"{row['model']:45} {how}: {row['memory_ratio']:.4f} of {row['plain_bytes'] / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
