"""A small float64 network, its batches by replica and step, and DiLoCo written out by hand in one process."""

import itertools

import torch
from torch import nn

EIGHT = 8  # examples a replica takes a step


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(replica, step, examples=EIGHT):
    generator = torch.Generator().manual_seed(1000 * replica + step)
    x = torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.sum(1).sin(), x.prod(1)], 1)


def backward(model, x, y):
    """Sets the gradient of the mean over examples; returns the loss."""
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def weights(model):
    """All weights of a model in one flat tensor, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


INNER = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


def train(model, optimizer, steps, start=0):
    """So many steps on the batches of replica 0."""
    for step in range(start, start + steps):
        backward(model, *batch(0, step))
        optimizer.step()


class ByHand:
    """Replicas by number, θ and v as flat tensors; a round runs over those named."""

    def __init__(self, make_inner, *, lr, momentum=0.9):
        self.make_inner, self.lr, self.momentum = make_inner, lr, momentum
        self.theta = weights(network())
        self.v = torch.zeros_like(self.theta)
        self.replicas = {}

    def round(self, members, steps):
        """steps: their numbers. A replica that is new begins at θ with a new inner optimizer."""
        deltas = []
        for number in members:
            if number not in self.replicas:
                model = network()
                self.replicas[number] = model, self.make_inner(model.parameters())
            model, inner = self.replicas[number]
            nn.utils.vector_to_parameters(self.theta.clone(), model.parameters())
            for step in steps:
                backward(model, *batch(number, step))
                inner.step()
            deltas.append(self.theta - weights(model))
        delta = sum(deltas) / len(deltas)
        self.v = self.momentum * self.v + delta
        self.theta = self.theta - self.lr * (delta + self.momentum * self.v)

    def rounds(self, members, first, last, inner_steps):
        """Whole rounds over the steps from `first` up to `last`."""
        for start in itertools.count(first, inner_steps):
            if start >= last:
                return
            self.round(members, range(start, min(start + inner_steps, last)))
