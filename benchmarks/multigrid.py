"""Claim: multigrid training reaches the accuracy of the plain run within 1.5 points with at most half of its floating
point operations and less than 0.45 times its updates (Wu et al. 2020; its own figures are 4.5 times less wall clock and
0.8 points more on Kinetics-400).

Clips of 8 x 32 x 32 with a blob that moves up, down, left or right before noise, 1,000 to train on and 500 to test; a
3-D CNN of three convolutions with BatchNorm. Baseline: batches of 8, 10 epochs, SGD 0.05 with momentum 0.9, the rate
divided by 10 after 6 and 8; 0.05 is the baseline's best of 0.01, 0.02 and 0.05 on two seeds that are not used.
Multigrid: both cycles, 15 epochs, BatchNorm over 8 clips as far as splits go. Both are evaluated at the full shape
after BatchNorm's statistics were taken anew from 25 batches. Operations are counted of each shape, the backward pass as
two forward ones; seconds are processor time on one thread, cutting the clips included. Medians over seeds, because a
baseline may not learn at all.
"""

import argparse
import statistics
import time

import torch
from _paired import report
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from batchlab.data.multigrid.multigrid_batches import MultigridBatches
from batchlab.data.multigrid.resample import Resampled
from batchlab.nn import set_batchnorm_kind
from batchlab.schedule.grids.multigrid import Multigrid, MultigridLR

FULL, BATCH, RATE, STEPS, EPOCHS = (8, 32, 32), 8, 0.05, (0, 6, 8), 10
NOISE = 2.0  # by the baseline alone, on a seed that is not used: it got all right at 0.5, 98 % at 1.5, 78 % at 2.5


def blobs(n, seed):
    """Clips (n, 1, 8, 32, 32) and their directions: a round blob of random place, size and speed, and noise."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (n,), generator=draw)
    way = torch.tensor([[0.0, 1], [0, -1], [1, 0], [-1, 0]])[label]
    speed = 1 + torch.rand(n, 1, generator=draw)
    start = 8 + 16 * torch.rand(n, 2, generator=draw)
    size = 2 + 2 * torch.rand(n, 1, 1, 1, generator=draw)
    time_ = torch.arange(8.0) - 3.5
    place = start[:, None] + (way * speed)[:, None] * time_[:, None]
    grid = torch.arange(32.0)
    far = (grid[:, None] - place[..., :1, None]) ** 2 + (grid - place[..., 1:, None]) ** 2
    clip = torch.exp(-far / (2 * size**2)) + NOISE * torch.randn(n, 8, 32, 32, generator=draw)
    return clip[:, None], label


def network(seed):
    torch.manual_seed(seed)
    layers = []
    for inner, outer, stride in ((1, 6, (1, 2, 2)), (6, 12, 2), (12, 24, 1)):
        layers += [nn.Conv3d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm3d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, 4))


def operations(sizes):
    """Floating point operations of one clip, forward and backward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(0).eval()(torch.zeros(1, 1, *sizes))
    return 3 * counter.get_total_flops()


def run(schedule, data, test, seed):
    """Accuracy, operations, updates and seconds of one run."""
    start, clips = time.process_time(), {}
    net = network(seed)
    batches = MultigridBatches(len(data[0]), schedule, seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    lr = MultigridLR(optimizer, schedule, batches)
    loader = DataLoader(Resampled(TensorDataset(*data), FULL), batch_sampler=batches)
    for epoch in range(schedule.length):
        set_batchnorm_kind(net, *schedule.batch_norm(epoch))
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            lr.step()
            clips[x.shape[2:]] = clips.get(x.shape[2:], 0) + len(x)
    seconds = time.process_time() - start
    set_batchnorm_kind(net, "plain")
    update_bn(data[0][: 25 * BATCH].split(BATCH), net)
    with torch.no_grad():
        right = (net.eval()(test[0]).argmax(1) == test[1]).float().mean()
    total = sum(operations(tuple(sizes)) * count for sizes, count in clips.items())
    return {"accuracy": float(right), "operations": total, "updates": lr.seen, "seconds": seconds}


def compared(seed, n=1000, epochs=EPOCHS, steps=STEPS):
    """Both runs of a seed."""
    data, test = blobs(n, 2 * seed), blobs(500, 2 * seed + 1)
    plain = Multigrid(FULL, BATCH, steps, epochs, epoch_factor=1, long_cycle=(), short_cycle=())
    base, ours = (run(schedule, data, test, seed) for schedule in (plain, Multigrid(FULL, BATCH, steps, epochs)))
    ratios = {f"{name}_ratio": ours[name] / base[name] for name in ("operations", "updates", "seconds")}
    accuracies = {"baseline": base["accuracy"], "multigrid": ours["accuracy"]}
    return {"seed": seed, **accuracies, "points": 100 * (ours["accuracy"] - base["accuracy"]), **ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in given.seeds:
        rows.append(compared(seed))
        print(rows[-1], flush=True)
    mid = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "seed"}
    holds = mid["points"] > -1.5 and mid["operations_ratio"] <= 0.5 and mid["updates_ratio"] < 0.45
    claim = " ".join(__doc__.split("\n\n")[0].split())
    report("multigrid", claim, [*rows, {"seed": "median", **mid, "holds": holds}], save=given.save)


if __name__ == "__main__":
    main()
