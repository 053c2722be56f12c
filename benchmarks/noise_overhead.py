"""Claim: measuring the gradient noise scale costs at most 2 % of a step's time from micro-batches or ranks, 3 % from
normalisation layers, 25 % from single examples by 8 projections. Exact norms of single examples take a fifth to two
fifths. What it takes of memory is in `noise_memory.py`.

At every step of a 4-layer GPT of width 256 and 4,096 tokens; smaller steps pay more, and where one takes milliseconds
the limits are kept at one step in so many as `batchlab plan` chooses for a long run from what measuring each costs
(`planner.cadence.noise_every`). Both are shown. The pairs of normalisation layers are of 50 steps each, so that one
with all layers is in every pair, after 400 steps in which all layers are measured 43 times; what those cost is
`first_400`.

The same training step with and without `GradientNoise`, one by one in turn, in one process: two copies of one model
with the same weights and data, AdamW, the gradient's norm computed on both sides (a training loop logs it and checks
that it is finite), which the noise scale then takes over. For ranks both copies are in DistributedDataParallel over one
process, with `no_sync` up to the last micro-batch. The ratio is the median over pairs, a pair being the time
of `calls` steps on each side; its interval is the bootstrap's. After the timing the two copies' weights must agree
in every bit.
"""

import contextlib
import copy
from typing import Any

import torch
from _paired import arguments, clock_of, kept, median_ratio, name_of, paired_seconds, report, result, write
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.planner.cadence import noise_every
from batchlab.workloads.models import ByteTransformer, ConvNet

LIMITS = {"micro_batch": 1.02, "ranks": 1.02, "norm_layers": 1.03, "per_example": 1.25}
GPT, WIDE = "4-layer GPT, width 128, length 64, batch 32", "4-layer GPT, width 256, length 64, batch 32"
LONG = "4-layer GPT, width 256, length 256, batch 16"
GPT2 = "12-layer GPT, width 768, length 1024, batch 32, bf16"  # with --device cuda, instead of all others
EXAMPLES = [("per_example", 1, 8), ("per_example", 1, None)]
METHODS = [
    *((GPT, method, pieces, None) for method in ("ranks", "norm_layers") for pieces in (1, 4)),
    *((GPT, *ways) for ways in (*EXAMPLES, ("per_example", 4, 8), ("per_example", 4, None))),
    *((model, *ways) for model in (WIDE, LONG) for ways in (("micro_batch", 4, None), ("ranks", 1, None), *EXAMPLES)),
    (LONG, "norm_layers", 1, None),
]
ON_GPU = [(GPT2, *ways) for ways in (("micro_batch", 8, None), ("ranks", 8, None), *EXAMPLES, ("norm_layers", 1, None))]


class Side:
    """One copy of a model in training, its noise measured at one step in `every`, or not at all."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        pieces: int,
        *,
        every: int = 0,
        method: str = "micro_batch",
        projections: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.model, self.device = copy.deepcopy(model).to(device), torch.device(device)
        inputs, targets = inputs.to(device), targets.to(device)
        if method == "ranks":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.noise = GradientNoise(self.model, method, every=every, projections=projections) if every else None
        self.parts = list(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True))
        self.examples = len(inputs)

    def step(self) -> None:
        """One update with the mean gradient of all parts."""
        *_, end = self.parts
        for x, y in self.parts:
            alone = isinstance(self.model, nn.parallel.DistributedDataParallel) and x is not end[0]
            watched = contextlib.nullcontext() if self.noise is None else self.noise.micro_batch(len(x))
            half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
            with watched, self.model.no_sync() if alone else contextlib.nullcontext():
                with half:
                    loss = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
                (loss * (len(x) / self.examples)).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        if self.noise is not None:
            self.noise.step(grad_sq_norm=norm**2)
        self.optimizer.step()
        self.optimizer.zero_grad()


def gpu_jobs() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """As `jobs`."""
    tokens = torch.randint(256, (32, 1025), generator=torch.Generator().manual_seed(0))
    return {GPT2: (ByteTransformer(1024, width=768, layers=12, heads=12), tokens[:, :-1], tokens[:, 1:])}


def jobs() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs and targets by name."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(256, 256), nn.ReLU())]
    features = torch.randn(256, 256, generator=generator)
    tokens, long = (torch.randint(256, (32, length + 1), generator=generator) for length in (64, 256))
    images = torch.randn(64, 1, 8, 8, generator=generator)
    classes = torch.randint(10, (256,), generator=generator)
    return {
        "6-layer MLP, width 256, batch 256": (nn.Sequential(*layers, nn.Linear(256, 10)), features, classes),
        GPT: (
            ByteTransformer(64, width=128, layers=4, heads=4),
            tokens[:, :-1],
            tokens[:, 1:],
        ),
        WIDE: (ByteTransformer(64, width=256, layers=4, heads=4), tokens[:, :-1], tokens[:, 1:]),
        LONG: (ByteTransformer(256, width=256, layers=4, heads=4), long[:16, :-1], long[:16, 1:]),
        "digits CNN, batch 64": (ConvNet(1, 8, 10), images, classes[:64]),
    }


def main() -> None:
    """Prints a row for each model, number of micro-batches and cadence, and one JSON object."""
    given = arguments(__doc__, pairs=30, only="the model")
    torch.set_num_threads(given.threads)
    on_gpu = given.device != "cpu"
    alone_in_a_group("nccl" if on_gpu else "gloo")
    clock, saved = clock_of(given), name_of("noise_overhead", given)
    claim = " ".join((__doc__ or "").split("\n\n")[0].split())
    rows = kept(saved, lambda row: given.only not in row["model"])
    for name, job in () if on_gpu else jobs().items():
        for pieces in () if name in (WIDE, LONG) or given.only not in name else (2, 4):
            settings: dict[str, Any] = {"pairs": given.pairs, "calls": 4 if "GPT" in name else 40, "clock": clock}
            row = {"model": name, "micro_batches": pieces}
            rows.append(row | timed(job, pieces, every=1, **settings))
            print(_sentence(rows[-1]), flush=True)
            seldom = noise_every(10**6, step_seconds=1.0, noise_seconds=max(0.0, rows[-1]["ratio"] - 1))
            if seldom > 1:
                rows.append(row | timed(job, pieces, every=seldom, **settings))
                print(_sentence(rows[-1]))
    known = gpu_jobs() if on_gpu else jobs()
    for name, method, pieces, projections in ON_GPU if on_gpu else METHODS:
        if given.only not in name:
            continue
        whole = method == "norm_layers"
        settings = {"pairs": 10 if whole else given.pairs, "calls": 50 if whole else 4, "clock": clock}
        if on_gpu:
            settings |= {"pairs": given.pairs, "calls": 1, "device": given.device}
        row = {"model": name, "micro_batches": pieces, "projections": projections}
        ways: dict[str, Any] = {"method": method, "projections": projections}
        rows.append(row | timed(known[name], pieces, every=1, **ways, **settings))
        print(_sentence(rows[-1]), flush=True)
        if given.save:
            write(result(saved, claim, rows))
    report(saved, claim, rows, save=given.save)


def timed(
    job: tuple[nn.Module, Tensor, Tensor],
    pieces: int,
    *,
    every: int,
    pairs: int,
    calls: int,
    clock: Any,
    method: str = "micro_batch",
    projections: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The ratio of the measured side's time to the plain side's, in pairs of `calls` steps each."""
    ways: dict[str, Any] = {"method": method, "projections": projections, "device": device}
    measured, plain = (Side(*job, pieces, every=each, **ways) for each in (every, 0))
    whole = method == "norm_layers" and device == "cpu"
    first = paired_seconds(measured.step, plain.step, pairs=4, calls=100, clock=clock, warm_up=0) if whole else []
    warm_up = 0 if whole else 5
    seconds = paired_seconds(measured.step, plain.step, pairs=pairs, calls=calls, clock=clock, warm_up=warm_up)
    same = all(map(torch.equal, measured.model.parameters(), plain.model.parameters()))
    assert same or device != "cpu", "measuring changed a weight"  # on a GPU two plain runs differ, too
    found = {"method": method, "every": every} | median_ratio(seconds)
    found |= {"holds": found["high"] <= LIMITS[method], "same_bits": same, "clock": clock.__name__, "calls": calls}
    found |= {"first_400": sum(a for a, _ in first) / sum(b for _, b in first)} if first else {}
    return found | {"step_ms": 1e3 * min(plain for _, plain in seconds) / calls, "pairs": seconds}


def alone_in_a_group(backend: str) -> None:
    """For DistributedDataParallel over this process."""
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def _sentence(row: dict[str, Any]) -> str:
    how = f"{row['method']}, {row['micro_batches']} micro-batches, every {row['every']}"
    how += f", {row['projections']} projections" if row.get("projections") else ""
    interval = f"[{row['low']:.4f}, {row['high']:.4f}]"
    first = f", first 400 steps {row['first_400']:.3f}" if "first_400" in row else ""
    return f"{row['model']:45} {how}: {row['ratio']:.4f} {interval} of {row['step_ms']:.2f} ms{first}"


if __name__ == "__main__":
    main()
