"""A job whose examples leave their numbers behind, and the loop by hand that every trainer must equal."""

import torch
from torch import nn
from torch.utils.data import Dataset

from batchlab.data.stream import SampleStream
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.batches.controller import BatchController

N = 100


class Numbered(Dataset):
    """`N` examples of 5 inputs in float64, with their numbers."""

    def __init__(self, n=N):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(1) + torch.randn(n, generator=generator, dtype=torch.float64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index], "number": torch.tensor(index)}


class Net(nn.Module):
    """Two layers in float64, the same at each making; `met` is the numbers of each training micro-batch."""

    def __init__(self, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.met = []

    def forward(self, x, y, number):
        if self.training:
            self.met.append(number.tolist())
        return {"loss": (self.layers(x).squeeze(1) - y).square().mean()}


class Table(BatchController):
    """The size after each update as a list has it, its last one held."""

    def __init__(self, sizes, needs=(), **limits):
        settings = {"maximum": max(sizes), "growth": 1e9, "multiple_of": 4} | limits
        super().__init__(sizes[0], **settings)
        self.sizes, self.needs = sizes, frozenset(needs)

    def wanted(self, step, facts):
        return self.sizes[min(step, len(self.sizes) - 1)]


def forget_accelerate():
    """Accelerate's state of the process, by which the first device and precision would hold for all that follows."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def sgd(net, lr=0.1):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def by_hand(sizes, rates, seed=0, pieces=4):
    """The weights after updates of these sizes at these rates; and the noise scale of pieces, before each update."""
    data, net = Numbered(), Net()
    optimizer, stream, position = sgd(net), SampleStream(N, seed), 0
    noise = GradientNoise(net)
    for size, rate in zip(sizes, rates, strict=True):
        batch = torch.as_tensor(stream.indices(position, size))
        position += size
        for rows in batch.chunk(pieces):
            with noise.micro_batch(len(rows)):
                (net(data.x[rows], data.y[rows], rows)["loss"] * len(rows) / size).backward()
        noise.step()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    noise.close()
    return [p.detach().clone() for p in net.parameters()], noise.estimate()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def numbers(micro_batches):
    return [number for piece in micro_batches for number in piece]


def stream(count, seed=0):
    """The first `count` examples of the stream: of a fixed run, and of any."""
    return SampleStream(N, seed).indices(0, count).tolist()
