"""Claim: at equal settings the range test reads what torch-lr-finder 0.2.2 reads: the same stopping step, the same
learning rate at the minimum of the smoothed loss, and losses equal to 1e-6, for every seed.

Digits, an MLP 64-64-10, SGD with momentum 0.9; a geometric ramp of 100 steps from 1e-3 to 10, smoothing 0.05, stop at
5 times the least, the same batches of 64. torch-lr-finder starts its moving average at the first loss, as ours does
with `debias=False`; what the default reads stands beside it. Our model must be given back in every bit.
"""

import contextlib
import copy
import io
from typing import Any

import torch
from _paired import arguments, report
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.measure.course.learning_rate import range_test
from batchlab.measure.restore import restored

LOW, HIGH, STEPS, SMOOTHING, STOP = 1e-3, 10.0, 100, 0.05, 5.0


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """100 batches of 64 digits, an order of its own for each seed."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(4)])[: 64 * STEPS]
    return [(x[part], y[part]) for part in order.split(64)]


def model_of(seed: int) -> nn.Module:
    """A fresh MLP."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def ours(model: nn.Module, data: Any, *, debias: bool) -> Any:
    """Our range test on the model, which is given back."""
    optimizer, feed = torch.optim.SGD(model.parameters(), lr=LOW, momentum=0.9), iter(data)

    def update(rate: float) -> float:
        x, y = next(feed)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    with restored(model, optimizer):
        return range_test(update, low=LOW, high=HIGH, steps=STEPS, smoothing=SMOOTHING, stop_factor=STOP, debias=debias)


def theirs(model: nn.Module, data: Any) -> Any:
    """torch-lr-finder on a copy of the model."""
    try:
        from torch_lr_finder import LRFinder
    except ImportError:
        raise InputError('this comparison needs its peer: pip install "torch-lr-finder==0.2.2" matplotlib') from None

    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    model = copy.deepcopy(model)
    finder = LRFinder(
        model, torch.optim.SGD(model.parameters(), lr=LOW, momentum=0.9), nn.CrossEntropyLoss(), device="cpu"
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finder.range_test(loader, end_lr=HIGH, num_iter=STEPS, smooth_f=SMOOTHING, diverge_th=STOP)
    return finder.history


def main() -> None:
    """Prints a row a seed and one JSON object."""
    given = arguments(__doc__, pairs=3)
    torch.set_num_threads(given.threads)
    rows = []
    for seed in range(given.pairs):
        model, data = model_of(seed), batches(seed)
        before = [p.detach().clone() for p in model.parameters()]
        mine, default, peer = ours(model, data, debias=False), ours(model, data, debias=True), theirs(model, data)
        least = min(range(len(peer["loss"])), key=peer["loss"].__getitem__)
        apart = max(abs(a / b - 1) for a, b in zip(mine.smoothed, peer["loss"], strict=False))
        row = {
            "seed": seed,
            "steps": [len(mine.losses), len(peer["loss"])],
            "minimum": [mine.minimum, peer["lr"][least]],
            "largest_relative_difference": apart,
            "minimum_debiased": default.minimum,
            "weights_given_back": all(map(torch.equal, before, model.parameters())),
        }
        row["holds"] = len(mine.losses) == len(peer["loss"]) and apart < 1e-6 and row["weights_given_back"]
        row["holds"] = bool(row["holds"] and abs(mine.minimum / peer["lr"][least] - 1) < 1e-6)
        rows.append(row)
        print(row)
    report("range_test_peer", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
