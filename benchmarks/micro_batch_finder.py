"""Claim: the micro-batch found runs, is at least 95 % of the limit, and takes 8 model passes at most to find.

`find_micro_batch` against Lightning's `Tuner.scale_batch_size` (both modes; 3 steps a size, and a margin of 5 % in
"binsearch", as it comes) and Accelerate's `find_executable_batch_size` (x0.9 after each failure, as it comes): the same
jobs and limits, in one process with one thread. All start from the same size; Accelerate only backs off, so that it is
also started from a guess above every limit. A pass is a forward pass, whole or failed. Peers do not evaluate, and so
batchlab's evaluation of each size is off.

Memory is simulated: a model counts the bytes of its weights, gradients, AdamW's moments and what autograd keeps of its
forward pass, in blocks of 512 as CUDA's allocator does, and raises `torch.OutOfMemoryError` in mid-pass where they
exceed a budget. The true limit is known by running it and one more. In some problems fragments, which no count shows,
take 3 % more. Where there are none, bytes grow in proportion to the size, the best case for a finder that is told them,
as batchlab is on a GPU by the allocator: its first row, where nothing is left free so that the limit is the peers'. The
second leaves 10 % free, its default, so that the claim's share is not asked of it; the third is told only the errors.

Peers' trainers are made before the clock starts, batchlab's and Accelerate's models within. All take turns, in reversed
order every other round; a ratio is that of batchlab's first row to the finder within a round, in wall and in processor
seconds, with the bootstrap's interval: below 1 batchlab is faster. All finders collect garbage, and what was imported
is frozen out of that: three libraries in one process would make it dearer than all else. So the collections are
counted, and what one takes with nothing frozen is printed.
"""

import argparse
import gc
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import lightning
import torch
from _paired import median_ratio, report
from accelerate.utils import find_executable_batch_size
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchlab import Job
from batchlab.core.errors import InputError
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.optim.by_name import create
from batchlab.workloads.examples import Examples, collate
from batchlab.workloads.models import ByteTransformer, ConvNet
from batchlab.workloads.objectives import cross_entropy

START, HIGH_START, MOST, BLOCK, CONFIRMING = 32, 1024, 4096, 512, 50
LIMITS = ((6, 0.0), (45, 0.0), (100, 0.0), (700, 0.0), (700, 0.03))  # true limit, share that fragments take
OURS, BLIND = "batchlab", "batchlab, errors only"
LIGHTNING, ACCELERATE = (f"{name} {version(name)}" for name in ("lightning", "accelerate"))
PASSES, SHARE = 8, 0.95


@dataclass
class Device:
    """A simulated device, and the `Meter` of it: counts bytes, fails beyond `usable`, remembers every pass."""

    usable: int
    fragments: float = 0.0
    held: int = 0
    highest: int = 0
    sizes: list[int] = field(default_factory=list)
    failures: int = 0

    def take(self, size: int) -> None:
        """So many bytes more."""
        self.held += -(-size // BLOCK) * BLOCK
        self.highest = max(self.highest, self.held)
        if self.held * (1 + self.fragments) > self.usable:
            self.failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")

    def start(self) -> None:
        self.highest = 0

    def peak(self) -> int:
        return self.highest


class Budgeted(nn.Module):
    """A model that tells a device what its weights take fourfold, and every storage that autograd keeps."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        super().__init__()
        self.model, self.on = model, device

    def forward(self, inputs: Tensor) -> Tensor:
        weights = [p.untyped_storage() for p in self.model.parameters()]
        seen = {storage.data_ptr() for storage in weights}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.on.take(storage.nbytes())
            return tensor.detach()

        self.on.sizes.append(len(inputs))
        self.on.held = 0
        self.on.take(4 * sum(storage.nbytes() for storage in weights))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            return self.model(inputs)


def jobs() -> dict[str, Callable[[Device], Job]]:
    """By name, a job on a device."""
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(MOST, 1, 8, 8, generator=generator), torch.randint(10, (MOST,), generator=generator)
    tokens = torch.randint(256, (MOST, 9), generator=generator)

    def job(make: Callable[[], nn.Module], data: Examples, device: Device) -> Job:
        return Job("sized", lambda: Budgeted(make(), device), cross_entropy, data, data, collate=collate)

    gpt = partial(ByteTransformer, 8, width=32, layers=1, heads=2)
    return {
        "digits CNN": partial(job, partial(ConvNet, 1, 8, 10), Examples(images, classes)),
        "1-layer GPT, width 32, length 8": partial(job, gpt, Examples(tokens[:, :-1], tokens[:, 1:])),
    }


def plain_step(job: Job) -> Callable[[int], None]:
    """One step as a user's loop has it: a batch of the size, forward, backward, update."""
    model = job.model()
    optimizer = create(job.optimizer, model, lr=0.0)

    def step(size: int) -> None:
        job.loss(model, next(iter(DataLoader(job.train, size, collate_fn=job.collate)))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batchlab_told(job: Job, device: Device, *, headroom: float) -> Callable[[], int]:
    """`find_micro_batch` as on a GPU; 0 where it says that not even one example leaves so much free."""
    settings: dict[str, Any] = {"start": START, "max_size": MOST, "saturation": 0, "device": "cpu", "evaluation": False}

    def search() -> int:
        try:
            return find_micro_batch(job, headroom=headroom, memory=device, **settings).size
        except InputError:
            return 0

    return search


class Module(lightning.LightningModule):
    """A job as Lightning wants it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model, self.batch_size = job, job.model(), START

    def training_step(self, batch: Any) -> Tensor:
        return self.job.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create(self.job.optimizer, self.model, lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.job.train, self.batch_size, collate_fn=self.job.collate)


def lightning_tuner(job: Job, device: Device, *, mode: str, folder: str) -> Callable[[], int]:
    """Lightning's, with all off that a search does not need."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, **off)
    return partial(Tuner(trainer).scale_batch_size, Module(job), mode=mode, init_val=START)


def accelerate_decorator(job: Job, device: Device, *, start: int) -> Callable[[], int]:
    """Accelerate's, with model and optimizer made inside as it is documented, until the first step that fits."""

    @find_executable_batch_size(starting_batch_size=start)
    def first_step(batch_size: int) -> int:
        plain_step(job)(batch_size)
        return batch_size

    return first_step


def finders(folder: str) -> dict[str, Callable[[Job, Device], Callable[[], int]]]:
    """By name, what makes a search ready to go."""
    return {
        OURS: partial(batchlab_told, headroom=0.0),
        f"{OURS}, 10 % left free": partial(batchlab_told, headroom=0.1),
        BLIND: lambda job, _: lambda: find_micro_batch(plain_step(job), start=START, max_size=MOST, device="cpu").size,
        f"{LIGHTNING}, power": partial(lightning_tuner, mode="power", folder=folder),
        f"{LIGHTNING}, binsearch": partial(lightning_tuner, mode="binsearch", folder=folder),
        f"{ACCELERATE}, from {START}": partial(accelerate_decorator, start=START),
        f"{ACCELERATE}, from {HIGH_START}": partial(accelerate_decorator, start=HIGH_START),
    }


def budget(job: Callable[[Device], Job], limit: int, fragments: float) -> int:
    """Bytes for `limit` examples and not for one more, halfway between."""
    needed = []
    for size in (limit, limit + 1):
        plain_step(job(device := Device(2**62)))(size)
        needed.append(device.highest * (1 + fragments))
    assert needed[0] < needed[1]
    return round(sum(needed) / 2)


def compare(job: Callable[[Device], Job], limit: int, fragments: float, rounds: int, folder: str) -> list[dict]:
    """A row for each finder."""
    fresh = partial(Device, budget(job, limit, fragments), fragments)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in finders(folder)}
    found: dict[str, tuple[int, Device, int]] = {}
    for index in range(-2, rounds):
        for name, finder in list(finders(folder).items())[:: -1 if index % 2 else 1]:
            search = finder(job(device := fresh()), device)
            gc.collect()
            collections = gc.get_stats()[2]["collections"]
            wall, processor = time.perf_counter(), time.process_time()
            size = search()
            spent[name].append((time.perf_counter() - wall, time.process_time() - processor))
            found[name] = size, device, gc.get_stats()[2]["collections"] - collections
    runs = {size: keeps_running(job(fresh()), size) for size in {size for size, *_ in found.values()}}
    rows = []
    for name, (size, device, collections) in found.items():
        tried = [each for each, _ in itertools.groupby(device.sizes)]
        row = {"finder": name, "size": size, "share": size / limit, "passes": len(device.sizes), "tried": tried}
        row |= {"steps": row["passes"] - device.failures, "out_of_memory": device.failures}
        row |= {"examples": sum(device.sizes), "runs": runs[size], "holds": None, "collections": collections}
        if name in (OURS, BLIND):
            row["holds"] = runs[size] and row["share"] >= SHARE and row["passes"] <= PASSES
        rows.append(row | seconds(spent[OURS][2:], spent[name][2:]))
    return rows


def seconds(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, Any]:
    """Median and ratio in wall and in processor seconds; pairs: (ours, theirs) of each clock, a round a line."""
    result: dict[str, Any] = {"pairs": [[round(x, 6) for x in (*o, *t)] for o, t in zip(ours, theirs, strict=True)]}
    for at, clock in enumerate(("wall", "processor")):
        ratio = median_ratio([(o[at], t[at]) for o, t in zip(ours, theirs, strict=True)])
        result[clock] = {"seconds": statistics.median(t[at] for t in theirs)} | ratio
    return result


def keeps_running(job: Job, size: int) -> bool:
    """Whether 50 steps of a fresh model at the size run without failing."""
    try:
        step = plain_step(job)
        for _ in range(CONFIRMING if size else 0):
            step(size)
    except torch.OutOfMemoryError:
        return False
    return size > 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    keys = ("size", "passes", "steps", "out_of_memory", "examples", "collections")
    ratios = " ".join("{ratio:6.2f} [{low:6.2f}, {high:6.2f}]".format(**row[clock]) for clock in ("wall", "processor"))
    cells = [f"{row['finder']:30} {row['share']:5.2f}", "yes " if row["runs"] else "no  "]
    cells += [*(f"{row[key]:6}" for key in keys), f"{row['wall']['seconds']:7.3f}", ratios]
    return " ".join([*cells, {True: "holds", False: "FAILS", None: "     "}[row["holds"]], *map(str, row["tried"])])


def main() -> None:
    """Prints a table for each model and limit, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/micro_batch_finder.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    began = time.perf_counter()
    gc.collect()
    print(f"a collection of garbage with nothing frozen: {time.perf_counter() - began:.3f} seconds")
    gc.freeze()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows = []
    for (model, job), (limit, fragments) in itertools.product(jobs().items(), LIMITS):
        print(f"\n{model}: limit {limit}, fragments {fragments:.0%}, start {START}")
        print(f"{'':30} share runs   size passes  steps  OOMs examples  gc seconds {'wall ratio':23} processor ratio")
        with tempfile.TemporaryDirectory() as folder:
            table = compare(job, limit, fragments, given.rounds, folder)
        print(*map(line, table), sep="\n", flush=True)
        rows += [{"model": model, "limit": limit, "fragments": fragments, "start": START} | row for row in table]
    held = [row["holds"] for row in rows if row["holds"] is not None]
    print(f"\nthe claim holds in {sum(held)} of {len(held)} rows")
    report("micro_batch_finder", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
