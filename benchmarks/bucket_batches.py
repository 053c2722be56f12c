"""Claim: on a million lengths, 5 times lhotse's batches a second; padding at most 5 % (1-D) and 12 % (2-D); each once.

Lengths: log-normal, exp(4 + 0.8 z) tokens, rounded up, at most 2,000 (median 55, mean 75); outputs exp(3 + 0.7 z') with
a correlation of z and z' of 0.5, at most 1,000 (mean 26). A batch holds 16,000 tokens, padding included.
`BucketBatchSampler` with 60 buckets (1-D), and with 40 by 5 (2-D), against lhotse's `DynamicBucketingSampler` with as
many buckets and the same budget (1-D: it has no other), shuffled, as it comes; for padding, also against transformers'
`LengthGroupedSampler` and torch's `BatchSampler` over `RandomSampler` at the mean size of ours. lhotse is given the
lightest examples that it takes, an object with a duration.

Speed: processor seconds of 50 batches in turn, after lhotse's buffers are filled and within one epoch; making the
samplers is apart. Ours draws shuffles in blocks ahead, so that a whole epoch is slower than 50 batches of it: the claim
is held against the whole epoch too. lhotse's audio libraries are stood in for where they are missing. --peers names the
folder that holds it. Padding: whole epochs, lhotse's over the batches that were timed. Tokens of input and output both.
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from _paired import median_ratio, paired_seconds, report
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from batchlab.data.lengths.bucket_batches import BucketBatchSampler, sizes_for_budget
from batchlab.data.lengths.length_buckets import LengthBuckets, padding_share

N, TOKENS, BATCHES, PAIRS = 1_000_000, 16_000, 50, 10
AUDIO = ("soundfile", "intervaltree", "cytoolz", "audioread", "lilcom", "torchaudio", "tabulate", "librosa")


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports mocks of lhotse's audio libraries where they are not installed; its sampler calls none of them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in AUDIO else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Example:
    """What lhotse's sampler asks of a cut."""

    __slots__ = ("dataloading_info", "duration", "id", "index")

    def __init__(self, index: int, duration: float) -> None:
        self.index, self.id, self.duration = index, str(index), duration


class Examples:
    """An iterable of all examples, in random order."""

    is_lazy = True

    def __init__(self, lengths: np.ndarray) -> None:
        order = np.random.default_rng(1).permutation(len(lengths)).tolist()
        self.all = [Example(at, float(lengths[at])) for at in order]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.all)


def data() -> np.ndarray:
    """Input and output lengths, shape (n, 2)."""
    z = np.random.default_rng(0).standard_normal((N, 2))
    inputs = np.minimum(np.ceil(np.exp(4 + 0.8 * z[:, 0])), 2000)
    outputs = np.minimum(np.ceil(np.exp(3 + 0.7 * (0.5 * z[:, 0] + 0.75**0.5 * z[:, 1]))), 1000)
    return np.stack([inputs, outputs], 1)


def made(lengths: np.ndarray, *shape: int) -> tuple[BucketBatchSampler, float]:
    """Ours, and the processor seconds that making it takes: estimating, choosing and ordering."""
    start = time.process_time()
    buckets = LengthBuckets.fitted(lengths, *shape)
    sampler = BucketBatchSampler(lengths, buckets, sizes_for_budget(buckets, TOKENS))
    return sampler, time.process_time() - start


def epoch_row(name: str, lengths: np.ndarray, sampler: BucketBatchSampler, seconds: float, most: float) -> dict:
    """An epoch of ours: padding, whether each example came once, and the batches of a processor second."""
    start = time.process_time()
    batches = list(sampler)
    spent = time.process_time() - start
    seen = np.bincount(np.concatenate(batches), minlength=N)
    taken = np.ones(N, dtype=np.int64)
    taken[sampler.rejected] = 0
    padding = padding_share(lengths, batches)
    row = {"sampler": name, "padding": padding, "each_once": bool((seen == taken).all()), "batches": len(batches)}
    row |= {"buckets": len(sampler.buckets), "rejected_share": len(sampler.rejected) / N, "make_seconds": seconds}
    return row | {"batches_a_second": len(batches) / spent, "holds": padding <= most and bool((seen == taken).all())}


def against_lhotse(lengths: np.ndarray, ours: BucketBatchSampler, whole: float) -> dict[str, Any]:
    """Batches a second in turn, and the padding of lhotse's. whole: ours of a second over a whole epoch."""
    import lhotse
    from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketingSampler

    examples, drawn = Examples(lengths), []
    start = time.process_time()
    peer = DynamicBucketingSampler(
        examples, max_duration=TOKENS, num_buckets=len(ours.buckets), shuffle=True, consistent_ids=False
    )
    theirs, mine = iter(peer), iter(ours)
    next(theirs)
    making = time.process_time() - start

    def draw(batches: Iterator[Any], keep: Callable[[Any], Any]) -> None:
        for batch in islice(batches, BATCHES):
            keep(batch)

    pairs = paired_seconds(
        lambda: draw(theirs, drawn.append), lambda: draw(mine, len), pairs=PAIRS, warm_up=1, clock=time.process_time
    )
    found = median_ratio(pairs)
    seconds = [sorted(side)[len(pairs) // 2] for side in zip(*pairs, strict=True)]
    batches = [[each.index for each in batch] for batch in drawn]
    row = {
        "sampler": f"lhotse {lhotse.__version__}",
        "padding": padding_share(lengths, batches),
        "make_seconds": making,
    }
    row |= {"batches_a_second": BATCHES / seconds[0], "ours_batches_a_second": BATCHES / seconds[1], "times": found}
    row |= {"mean_size": sum(map(len, batches)) / len(batches), "pairs": pairs}
    by_epoch = whole / row["batches_a_second"]
    return row | {"times_by_whole_epoch": by_epoch, "holds": found["low"] >= 5 and by_epoch >= 5}


def others(lengths: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Padding of the peers with one size."""
    generator = torch.Generator().manual_seed(0)
    longest = lengths.reshape(N, -1)[:, 0].astype(int).tolist()
    grouped = LengthGroupedSampler(size, lengths=longest, generator=generator)
    plain = RandomSampler(range(N), generator=generator)
    rows = []
    for name, sampler in (("transformers LengthGroupedSampler", grouped), ("torch RandomSampler", plain)):
        start = time.process_time()
        batches = list(BatchSampler(sampler, size, drop_last=False))
        spent = time.process_time() - start
        row = {"sampler": name, "padding": padding_share(lengths, batches), "batches_a_second": len(batches) / spent}
        worst = max(len(batch) * lengths.reshape(N, -1)[batch].max(0).sum() for batch in batches)
        rows.append(row | {"mean_size": size, "largest_batch_tokens": float(worst)})
    return rows


def main() -> None:
    """Prints a row for each sampler in one and in two dimensions, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="a folder that holds lhotse, where it is not installed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bucket_batches.json")
    given = parser.parse_args()
    sys.path += [given.peers] if given.peers else []
    sys.meta_path.append(Absent())
    torch.set_num_threads(1)
    pairs = data()
    rows: list[dict[str, Any]] = []
    for name, lengths, shape, most in (("1-D", pairs[:, 0], (60,), 0.05), ("2-D", pairs, (40, 5), 0.12)):
        sampler, seconds = made(lengths, *shape)
        rows.append({"lengths": name} | epoch_row("batchlab", lengths, sampler, seconds, most))
        if name == "1-D":
            rows.append({"lengths": name} | against_lhotse(lengths, sampler, rows[-1]["batches_a_second"]))
        size = round((N - len(sampler.rejected)) / len(sampler))
        rows += [{"lengths": name} | row for row in others(lengths, size)]
    for row in rows:
        words = {True: "holds", False: "FAILS", None: ""}[row.get("holds")]
        print(f"{row['lengths']} {row['sampler']:34} padding {row['padding']:6.2%}", end=" ")
        print(f"{row['batches_a_second']:8.0f} batches a second {words}", end=" ")
        print({name: round(value, 1) for name, value in row["times"].items()} if "times" in row else "", end=" ")
        print(f"{row['times_by_whole_epoch']:.1f} by the whole epoch" if "times" in row else "")
    report("bucket_batches", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
