"""Claim: measuring the gradient noise scale costs under 3 % of a step's time with two or more micro-batches.

The same training step with and without `GradientNoise`, one by one in turn, in one process: two copies of one model
with the same weights and data, AdamW, the gradient's norm computed on both sides (a training loop logs it and checks
that it is finite), which the noise scale then takes over. The ratio is the median over pairs, a pair being the time
of `calls` steps on each side; its interval is the bootstrap's. After the timing the two copies' weights must agree
in every bit.
"""

import contextlib
import copy
import time

import torch
from _paired import arguments, median_ratio, paired_seconds, report
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.measure.noise import GradientNoise
from batchlab.workloads.models import ByteTransformer, ConvNet

LIMIT = 1.03


class Side:
    """One copy of a model in training, measured or not."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, pieces: int, *, measured: bool) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.noise = GradientNoise(self.model) if measured else None
        self.parts = list(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True))
        self.examples = len(inputs)

    def step(self) -> None:
        """One update with the mean gradient of all parts."""
        for x, y in self.parts:
            with contextlib.nullcontext() if self.noise is None else self.noise.micro_batch(len(x)):
                loss = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
                (loss * (len(x) / self.examples)).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        if self.noise is not None:
            self.noise.step(grad_sq_norm=norm**2)
        self.optimizer.step()
        self.optimizer.zero_grad()


def jobs() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs and targets by name."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(256, 256), nn.ReLU())]
    features = torch.randn(256, 256, generator=generator)
    tokens = torch.randint(256, (32, 65), generator=generator)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    classes = torch.randint(10, (256,), generator=generator)
    return {
        "6-layer MLP, width 256, batch 256": (nn.Sequential(*layers, nn.Linear(256, 10)), features, classes),
        "4-layer GPT, width 128, length 64, batch 32": (
            ByteTransformer(64, width=128, layers=4, heads=4),
            tokens[:, :-1],
            tokens[:, 1:],
        ),
        "digits CNN, batch 64": (ConvNet(1, 8, 10), images, classes[:64]),
    }


def main() -> None:
    """Prints a row for each model and number of micro-batches, and one JSON object."""
    given = arguments(__doc__, pairs=30)
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.processor_time else time.perf_counter
    rows = []
    for name, (model, inputs, targets) in jobs().items():
        for pieces in (2, 4):
            measured, plain = (Side(model, inputs, targets, pieces, measured=on) for on in (True, False))
            calls = 2 if "GPT" in name else 20
            pairs = paired_seconds(measured.step, plain.step, pairs=given.pairs, calls=calls, clock=clock)
            same = all(map(torch.equal, measured.model.parameters(), plain.model.parameters()))
            found = median_ratio(pairs)
            milliseconds = 1e3 * min(seconds for _, seconds in pairs) / calls
            rows.append(
                {"model": name, "micro_batches": pieces}
                | found
                | {"clock": clock.__name__, "calls": calls, "pairs": pairs}
            )
            rows[-1] |= {"same_bits": same, "holds": found["high"] <= LIMIT}
            interval = f"[{found['low']:.4f}, {found['high']:.4f}]"
            print(f"{name:45} {pieces} micro-batches: {found['ratio']:.4f} {interval}, plain {milliseconds:.2f} ms")
            assert same, "measuring changed a weight"
    report("noise_overhead", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
