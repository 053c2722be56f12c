"""Claim: where gradients fall to ε before a loss spike, `AdamStability` alarms before it; at every=50 it costs 3 %.

Where they do not, it does not warn, and where they stay there it alarms for long without a spike: both are shown.

Spikes: MLPs on the digits, trained far beyond their target until gradients are as small as ε, the state in which large
models have spiked. Settings that spike and settings that do not, several seeds each, every seed reported. A spike is
a loss on all training data above ten times the median of the 50 steps before it and above 0.05 nats, 100 steps or
more after the last. For each run: its first spike, and the first alarm in the 200 steps before it; in a run without a
spike, the first alarm of all, which is false. Over all readings where alarms are allowed:
the share of alarms among readings with a spike in the next 200 steps (hits), and among the others (false alarms); an
alarm that is always on has both alike. As a peer, the same for "the gradient's norm is above 10 times, or below a
tenth of, its median over the 50 steps before".

Cost: the same training step with and without the monitor, in turn, in one process; each pair is 50 steps, one reading
among them. Afterwards the two copies' weights must agree in every bit.
"""

import argparse
import copy
import itertools
import math
import statistics
import time
from typing import Any

import torch
from _paired import median_ratio, paired_seconds, report
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.measure.course.adam_reading import StabilityReading
from batchlab.measure.course.adam_stability import AdamStability
from batchlab.workloads.digits import digits
from batchlab.workloads.models import ByteTransformer, ConvNet

LIMIT = 1.03
HORIZON, WINDOW, EVERY = 200, 50, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "full batch, lr 1e-2, β2 0.95": {"batch": 0, "lr": 1e-2},
    "full batch, lr 3e-3, β2 0.95": {"batch": 0, "lr": 3e-3},
    "batch 256, lr 1e-2, β2 0.95": {"batch": 256, "lr": 1e-2},
    "full batch, lr 1e-3, β2 0.95": {"batch": 0, "lr": 1e-3},
    "batch 256, lr 1e-3, β2 0.95": {"batch": 256, "lr": 1e-3},
    "batch 32, lr 1e-3, β2 0.95": {"batch": 32, "lr": 1e-3},
    "full batch, lr 1e-2, β2 0.95, ε 1e-15": {"batch": 0, "lr": 1e-2, "eps": 1e-15},
    "full batch, lr 1e-2, β2 0.99": {"batch": 0, "lr": 1e-2, "beta2": 0.99},
    "full batch, lr 1e-1, β2 0.95": {"batch": 0, "lr": 1e-1},
}


def train(
    data: tuple[Tensor, Tensor], seed: int, steps: int, *, batch: int, lr: float, beta2: float = 0.95, eps: float = 1e-8
) -> tuple[list[float], list[float], list[StabilityReading]]:
    """Loss on all data before each step, the gradient's norm, and the monitor's readings."""
    x, y = data
    torch.manual_seed(seed)
    sizes = [x.shape[1], 48, 48, 48, 10]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), eps=eps)
    readings: list[StabilityReading] = []
    stability = AdamStability(optimizer, model=model, every=EVERY, on_reading=readings.append)
    losses, norms = [], []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if batch:
            chosen = torch.randint(len(x), (batch,))
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    stability.close()
    return losses, norms, readings


def spikes(losses: list[float]) -> list[int]:
    """Steps at which a spike begins."""
    found: list[int] = []
    for step in range(100, len(losses)):
        usual = statistics.median(losses[step - WINDOW : step])
        high = not losses[step] <= max(10 * usual, 0.05)
        if high and (not found or step - found[-1] >= 100):
            found.append(step)
    return found


def norm_alarms(norms: list[float], steps: list[int]) -> set[int]:
    """The peer's alarms, at the same steps as the monitor's readings."""
    alarmed = set()
    for step in steps:
        usual, now = statistics.median(norms[step - 1 - WINDOW : step - 1]), norms[step - 1]
        if not usual / 10 <= now <= 10 * usual:
            alarmed.add(step)
    return alarmed


def lead(name: str, data: tuple[Tensor, Tensor], seeds: int, steps: int) -> dict[str, Any]:
    """One setting: every seed's first alarm and first spike, and how alarms and spikes go together."""
    runs, counts = [], {"monitor": [0, 0, 0, 0], "gradient norm": [0, 0, 0, 0]}
    for seed in range(seeds):
        losses, norms, readings = train(data, seed, steps, **SETTINGS[name])
        begun = spikes(losses)
        warm = 3 / (1 - SETTINGS[name].get("beta2", 0.95)) + 1
        asked = [r.step for r in readings if r.step > max(100, warm)]
        alarmed = {r.step for r in readings if r.alarms}
        for detector, fired in (("monitor", alarmed), ("gradient norm", norm_alarms(norms, asked))):
            for step in asked:
                ahead = any(step <= spike < step + HORIZON for spike in begun)
                within = any(spike <= step - 1 < spike + 100 for spike in begun)
                if ahead or not within:  # while a spike is under way there is nothing to foretell
                    counts[detector][2 * ahead + (step in fired)] += 1
        reach = (begun[0] - HORIZON, begun[0]) if begun else (0, steps)
        before = [step for step in sorted(alarmed) if reach[0] < step <= reach[1]]
        kinds = sorted({alarm for r in readings if r.step in before for _, alarm in r.alarms})
        first = before[0] if before else None
        run = {"seed": seed, "first_spike": begun[0] if begun else None, "spikes": len(begun), "first_alarm": first}
        run["lead"] = begun[0] - first if begun and first is not None else None
        runs.append(run | {"kinds": kinds, "final_loss": losses[-1]})
        print(f"{name:40} {runs[-1]}", flush=True)
    rates = {}
    for detector, (quiet, false, missed, hit) in counts.items():
        rates[detector] = {
            "hits": hit / (hit + missed) if hit + missed else math.nan,
            "false_alarms": false / (false + quiet) if false + quiet else math.nan,
            "readings_before_spikes": hit + missed,
            "readings_otherwise": false + quiet,
        }
    leads = [run["lead"] for run in runs if run["lead"] is not None]
    spiked = sum(run["first_spike"] is not None for run in runs)
    row = {"setting": name, "runs": runs, "rates": rates, "spiked": spiked, "warned": len(leads)}
    print(f"{name:40} warned {len(leads)} of {spiked}, leads {sorted(leads)}, {rates}", flush=True)
    return row | {"median_lead": statistics.median(leads) if leads else None}


class Side:
    """One copy of a model in training, watched or not."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, *, watched: bool) -> None:
        self.model, self.inputs, self.targets = copy.deepcopy(model), inputs, targets
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.stability = AdamStability(self.optimizer, model=self.model) if watched else None

    def step(self) -> None:
        """One update."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs).flatten(0, -2), self.targets.flatten()).backward()
        self.optimizer.step()


def jobs() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs and targets by name."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(256, 256), nn.ReLU())]
    tokens = torch.randint(256, (16, 65), generator=generator)
    classes = torch.randint(10, (256,), generator=generator)
    return {
        "6-layer MLP, width 256, batch 256": (
            nn.Sequential(*layers, nn.Linear(256, 10)),
            torch.randn(256, 256, generator=generator),
            classes,
        ),
        "4-layer GPT, width 128, length 64, batch 16": (
            ByteTransformer(64, width=128, layers=4, heads=4),
            tokens[:, :-1],
            tokens[:, 1:],
        ),
        "digits CNN, batch 64": (ConvNet(1, 8, 10), torch.randn(64, 1, 8, 8, generator=generator), classes[:64]),
    }


def overhead(name: str, pairs: int, clock: Any) -> dict[str, Any]:
    """The ratio of a watched step's time to a plain one's."""
    model, inputs, targets = jobs()[name]
    watched, plain = (Side(model, inputs, targets, watched=each) for each in (True, False))
    seconds = paired_seconds(watched.step, plain.step, pairs=pairs, warm_up=1, calls=50, clock=clock)
    same = all(map(torch.equal, watched.model.parameters(), plain.model.parameters()))
    assert same, "watching changed a weight"
    row: dict[str, Any] = {"model": name} | median_ratio(seconds)
    row |= {"holds": row["high"] <= LIMIT, "same_bits": same, "clock": clock.__name__}
    row |= {"step_ms": 1e3 * min(plain for _, plain in seconds) / 50, "pairs": seconds}
    print(f"{name:45} {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] of {row['step_ms']:.2f} ms", flush=True)
    return row


def main() -> None:
    """Prints every seed, a line a setting, the overhead, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--processor-time", action="store_true", help="not wall time: for a busy machine, one thread")
    parser.add_argument("--only", choices=("lead", "overhead"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/adam_stability_lead.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    if given.only != "lead":
        clock = time.process_time if given.processor_time else time.perf_counter
        rows += [overhead(name, given.pairs, clock) for name in jobs()]
    if given.only != "overhead":
        job = digits()
        x, y = (torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*job.train, strict=True))
        rows += [lead(name, (x.flatten(1).float(), y), given.seeds, given.steps) for name in SETTINGS]
    report("adam_stability_lead", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
