"""The family of small tasks that the learned optimizer is trained and judged on: many of one kind at once, batched.

A kind is a data set, a network and a batch size; tasks of a kind differ in their data, labels and first weights. The
data: scikit-learn's digits, some of the ten classes, 8 x 8 pixels or 4 x 4 means of them, of mean 0 and deviation 1
over the set; or normal vectors labelled by a random teacher network. The network: an MLP of one or two hidden layers
with torch's own first weights. Tasks to judge by have seeds that training never draws, and of the digits other images.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

JUDGED_FROM = 1_000_000  # seeds from here on are for judging
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}


@dataclass(frozen=True)
class Kind:
    """inputs: for digits 64 or 16, the pixels. widths: of the hidden layers. batch: examples a step."""

    data: str
    inputs: int
    classes: int
    widths: tuple[int, ...]
    activation: str
    batch: int


@dataclass
class Tasks:
    """Some tasks of a kind. weights: the first ones, each (tasks, ...). x: (tasks, steps, batch, inputs). y: labels."""

    kind: Kind
    weights: list[Tensor]
    x: Tensor
    y: Tensor


def draw_kind(seed: int) -> Kind:
    """A kind at random."""
    draw = random.Random(seed)
    data = draw.choice(["digits", "digits", "teacher"])
    widths = draw.choice([(8,), (16,), (32,), (16, 16), (8, 8)])
    batch, activation = draw.choice([16, 32, 64]), draw.choice(sorted(ACTIVATIONS))
    if data == "digits":
        return Kind(data, draw.choice([16, 16, 64]), draw.randint(3, 10), widths, activation, batch)
    return Kind(data, draw.choice([8, 16, 32]), draw.randint(2, 6), widths, activation, batch)


def draw_tasks(kind: Kind, count: int, steps: int, seed: int) -> Tasks:
    """`count` tasks, with the batches of `steps` steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [kind.inputs, *kind.widths, kind.classes]
    weights = [each for a, b in pairwise(sizes) for each in _linear(count, a, b, generator)]
    make = _digits if kind.data == "digits" else _teacher
    x, y = make(kind, count, steps, seed >= JUDGED_FROM, generator)
    return Tasks(kind, weights, x, y)


def losses(tasks: Tasks, weights: list[Tensor], step: int, copies: int = 1) -> Tensor:
    """The mean loss of each task over its batch of that step. copies: how many times the weights hold each task."""
    x, y = tasks.x[:, step].repeat(copies, 1, 1), tasks.y[:, step].repeat(copies, 1)
    activation: Any = ACTIVATIONS[tasks.kind.activation]
    last = len(weights) // 2 - 1
    for index, (w, b) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        x = torch.baddbmm(b[:, None], x, w.mT)
        x = activation(x) if index < last else x
    picked = x.log_softmax(-1).gather(-1, y[..., None])
    return -picked.mean((-1, -2))


def gradients(tasks: Tasks, weights: list[Tensor], step: int, copies: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The losses, and the gradient of each task's own."""
    held = [w.detach().requires_grad_() for w in weights]
    found = losses(tasks, held, step, copies)
    return found.detach(), list(torch.autograd.grad(found.sum(), held))


def _linear(count: int, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform in ±1/√inputs, as torch.nn.Linear."""
    bound = inputs**-0.5
    weight = (torch.rand(count, outputs, inputs, generator=generator) * 2 - 1) * bound
    return weight, (torch.rand(count, outputs, generator=generator) * 2 - 1) * bound


@cache
def _images(inputs: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)
    x = torch.nn.functional.adaptive_avg_pool2d(x, math.isqrt(inputs)).flatten(1)
    return (x - x.mean()) / x.std(), torch.tensor(y)


def _digits(kind: Kind, count: int, steps: int, judged: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, labels = _images(kind.inputs)
    mine = torch.arange(len(labels)) % 4 == 0 if judged else torch.arange(len(labels)) % 4 != 0
    xs, ys = [], []
    for _ in range(count):
        chosen = torch.randperm(10, generator=generator)[: kind.classes]
        places = torch.nonzero(mine & torch.isin(labels, chosen)).flatten()
        drawn = places[torch.randint(len(places), (steps, kind.batch), generator=generator)]
        number = torch.empty(10, dtype=torch.long)
        number[chosen] = torch.arange(kind.classes)
        xs.append(images[drawn])
        ys.append(number[labels[drawn]])
    return torch.stack(xs), torch.stack(ys)


def _teacher(kind: Kind, count: int, steps: int, judged: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, steps, kind.batch, kind.inputs, generator=generator)
    first = torch.randn(count, kind.inputs, 16, generator=generator) / kind.inputs**0.5
    second = torch.randn(count, 16, kind.classes, generator=generator)
    hidden = torch.tanh(2 * x.flatten(1, 2) @ first)
    return x, (hidden @ second).argmax(-1).view(count, steps, kind.batch)
