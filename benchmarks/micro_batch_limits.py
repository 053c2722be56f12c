"""Claim: for limits to 300 and any start, a size that was run, within 5 % of the limit, in 8 steps at the median.

A step runs out of memory above a limit; limits 1 to 300, starts 1, 7, 32 and 256. batchlab's `find_micro_batch` as it
comes, told nothing but whether a step failed; exact (`rel_gap=0`); and told bytes as it is on a GPU, of which 30 % are
fixed and the rest grows with the size. Lightning's `Tuner.scale_batch_size` in both modes as it comes (a margin of 5 %
in "binsearch"), on a trainer of one device; Accelerate's `find_executable_batch_size`, which only backs off, so that
from a start below the limit it stays there; and the rule of the OOMptimizer script (Zelasko et al. 2024), written anew.

Steps are sizes that were run: Lightning runs each three times. `not_run` counts answers that were never run, `over`
those above the limit, `near` the share of answers within 5 % below it, as (limit + 1 - answer)/(limit + 1) <= 0.05.
A finder that raises has no answer: `failed`. Every row is of 300 limits.
"""

import argparse
import gc
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import lightning
import torch
from _paired import report
from accelerate.utils import find_executable_batch_size
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchlab.measure.memory.micro_batch import find_micro_batch

LIMITS, STARTS, MOST, NEAR, STEPS = range(1, 301), (1, 7, 32, 256), 4096, 0.05, 8
FIXED = 0.3
LIGHTNING, ACCELERATE = (f"{name} {version(name)}" for name in ("lightning", "accelerate"))


@dataclass
class Bounded:
    """A step that fails above a limit, and the meter that tells its bytes; notes every size."""

    limit: int
    usable: int = 10**6
    tried: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.ran.append(size)

    def start(self) -> None:
        """Nothing to forget."""

    def peak(self) -> int:
        """Of the last size."""
        return round(self.usable * (FIXED + (1 - FIXED) * self.tried[-1] / (self.limit + 0.5)))


class Module(lightning.LightningModule):
    """The step as Lightning wants it."""

    def __init__(self, step: Bounded, start: int) -> None:
        super().__init__()
        self.step, self.batch_size, self.weight = step, start, nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor) -> Tensor:
        self.step(len(batch))
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(MOST, 1), self.batch_size)


def lightnings(mode: str, folder: str) -> Callable[[Bounded, int], int | None]:
    """Lightning's tuner, with all off that a search does not need."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def find(step: Bounded, start: int) -> int | None:
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, **off)
        return Tuner(trainer).scale_batch_size(Module(step, start), mode=mode, init_val=start)

    return find


def accelerates(step: Bounded, start: int) -> int:
    """Accelerate's decorator, until the first step that fits."""

    @find_executable_batch_size(starting_batch_size=start)
    def first_step(batch_size: int) -> int:
        step(batch_size)
        return batch_size

    return first_step()


def released(step: Bounded, start: int) -> int:
    """The rule of the OOMptimizer script: it doubles, halves and takes arithmetic means, to a gap of 5 %."""
    size, ok, failed = start, None, None
    while ok is None or failed is None or ((failed - ok) / failed > NEAR and failed - ok > 1):
        try:
            step(size)
            ok = max(size, ok or size)
            size = 2 * size if failed is None else round((ok + failed) / 2)
        except torch.OutOfMemoryError:
            failed = min(size, failed or size)
            size = round(size / 2) if ok is None else round((ok + failed) / 2)
    return ok


def finders(folder: str) -> dict[str, Callable[[Bounded, int], int | None]]:
    """By name, what finds a size for a step from a start."""

    def ours(**settings: Any) -> Callable[[Bounded, int], int]:
        def find(step: Bounded, start: int) -> int:
            told = {"memory": step, "headroom": 0.0} if settings.get("told") else {}
            gap = settings.get("rel_gap", NEAR)
            return find_micro_batch(step, max_size=MOST, start=start, rel_gap=gap, device="cpu", **told).size

        return find

    return {
        "batchlab, errors only": ours(),
        "batchlab, errors only, exact": ours(rel_gap=0.0),
        "batchlab, told bytes": ours(told=True),
        "batchlab, told bytes, exact": ours(told=True, rel_gap=0.0),
        "OOMptimizer's rule": released,
        f"{LIGHTNING}, power": lightnings("power", folder),
        f"{LIGHTNING}, binsearch": lightnings("binsearch", folder),
        ACCELERATE: accelerates,
    }


def row(name: str, find: Callable[[Bounded, int], int | None], start: int, limits: range) -> dict[str, Any]:
    """What one finder did from one start over all limits."""
    steps, shares, counts = [], [], dict.fromkeys(("not_run", "over", "near", "failed"), 0)
    for limit in limits:
        step = Bounded(limit)
        try:
            answer = find(step, start)
        except Exception:
            answer = None
        steps.append(len(set(step.tried)))
        counts["failed"] += answer is None
        if answer is not None:
            counts["not_run"] += answer not in step.ran
            counts["over"] += answer > limit
            counts["near"] += answer <= limit and (answer == limit or (limit + 1 - answer) / (limit + 1) <= NEAR)
            shares.append(answer / limit)
    result = {"finder": name, "start": start, "median_steps": statistics.median(steps), "most_steps": max(steps)}
    result |= {"median_share": statistics.median(shares or [float("nan")]), "near": counts["near"] / len(limits)}
    result |= {"not_run": counts["not_run"], "over": counts["over"], "failed": counts["failed"], "holds": None}
    if name.startswith("batchlab"):
        kept = counts["near"] == len(limits) and not counts["not_run"] + counts["over"] + counts["failed"]
        result["holds"] = kept and (name.endswith("exact") or result["median_steps"] <= STEPS)
    return result


def main() -> None:
    """Prints a row for each finder and start, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each such limit")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/micro_batch_limits.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    gc.collect()
    gc.freeze()
    rows = []
    print(f"{'':30} start  steps: median  most  share: median  near  not run  over  failed")
    with tempfile.TemporaryDirectory() as folder:
        for name, find in finders(folder).items():
            for start in STARTS:
                each = row(name, find, start, LIMITS[:: given.every])
                rows.append(each)
                cells = (
                    f"{name:30} {start:5} {each['median_steps']:14} {each['most_steps']:5} {each['median_share']:14.2f}"
                )
                counts = f"{each['near']:5.0%} {each['not_run']:8} {each['over']:5} {each['failed']:7}"
                print(cells, counts, {True: "holds", False: "FAILS", None: ""}[each["holds"]], flush=True)
    held = [each["holds"] for each in rows if each["holds"] is not None]
    print(f"the claim holds in {sum(held)} of {len(held)} rows")
    report("micro_batch_limits", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
