"""Trains the weights of `batchlab.optim.LearnedOptimizer`: evolution strategies over families of small tasks.

    python scripts/meta_train_optimizer.py --minutes 50 --out small_fc_lopt.safetensors

One outer step draws a kind of task and `pairs` tasks of it, and trains each with θ + σε and with θ - σε, all at once.
The meta-loss is the mean loss over the inner steps, over ln(classes) and at most 2; its gradient the mean over pairs of
(L₊ - L₋)/(2σ)·ε; then Adam, with a cosine rate, on the gradient clipped to `clip` times the median norm of the last 50.
θ holds the network's weights and the shifts of its seven decays. With `--persistent` the inner run is cut into parts,
each with a new ε; the sum of all ε so far takes its place in the gradient (Vicol et al. 2021, arXiv 2112.13835).
θ starts as a random network with one path that steps like Adam.

This recipe is batchlab's own, and runs on CPUs within the hour.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from optimizer_tasks import JUDGED_FROM, Tasks, draw_kind, draw_tasks, gradients
from torch import Tensor

from batchlab.optim.learned.features import FEATURES, features, row_factor, time_features
from batchlab.optim.learned.weights import EXP_MULT, STEP_MULT, OptimizerWeights, betas, fresh_weights, save_weights

MOMENTUM_OVER_ROOT = 6  # the place of m/√v with β₀ = 0.9 among the features
MOST_LOSS = 2.0
SETTINGS = ("minutes", "pairs", "steps", "persistent", "sigma", "rate", "clip", "seed", "threads")


def first_weights(seed: int) -> OptimizerWeights:
    """A random network, its last layer a tenth, with one path of weights 1 that gives d = m/√v, q = 0."""
    fresh = fresh_weights(seed)
    w1, _, w2, _, w3, _ = fresh.layers
    w3.mul_(0.1)
    w1[:2], w2[:2], w3[:, :2] = 0.0, 0.0, 0.0
    for unit, sign in ((0, 1.0), (1, -1.0)):
        w1[unit, MOMENTUM_OVER_ROOT], w2[unit, unit], w3[0, unit] = sign, 1.0, sign
    return fresh


def flat(weights: OptimizerWeights) -> Tensor:
    """θ: all layers, then the shifts of the decays times 10, so that a step moves both alike."""
    return torch.cat([*(each.flatten() for each in weights.layers), 10 * weights.deltas])


def unflat(theta: Tensor, like: OptimizerWeights) -> tuple[list[Tensor], Tensor]:
    """Layers and shifts of θ, or of a batch of θ, (..., numbers)."""
    parts = theta.split([each.numel() for each in like.layers] + [7], -1)
    layers = [part.unflatten(-1, each.shape) for part, each in zip(parts, like.layers)]
    return layers, parts[-1] / 10


class Inner:
    """Inner runs of tasks by optimizers of their own, all at once."""

    def __init__(self, tasks: Tasks, copies: int) -> None:
        self.tasks, self.copies, self.t = tasks, copies, 0
        self.weights = [w.repeat(copies, *[1] * (w.ndim - 1)) for w in tasks.weights]
        self.state = [self._zeros(ordered(w)) for w in self.weights]

    def _zeros(self, w: Tensor) -> list[Tensor]:
        shape = [3, *w.shape]
        if w.ndim == 2:
            return [torch.zeros(shape), torch.zeros(w.shape), torch.zeros(shape)]
        thin = [[*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]]
        return [torch.zeros(shape), torch.zeros(w.shape), *map(torch.zeros, thin)]

    def run(self, layers: list[Tensor], decays: Tensor, steps: int) -> Tensor:
        """The losses before each of the steps, (steps, copies·tasks)."""
        found = []
        for _ in range(steps):
            loss, grads = gradients(self.tasks, self.weights, self.t, self.copies)
            found.append(loss)
            time = torch.tensor(time_features(self.t))
            for w, g, state in zip(self.weights, grads, self.state, strict=True):
                stepped(ordered(w), ordered(g), state, time, decays, layers)
            self.t += 1
        return torch.stack(found)


def ordered(w: Tensor) -> Tensor:
    """The same with the larger dimension of matrices last."""
    return w.mT if w.ndim == 3 and w.shape[1] > w.shape[2] else w


def stepped(w: Tensor, g: Tensor, state: list[Tensor], time: Tensor, decays: Tensor, layers: list[Tensor]) -> None:
    """`small_fc_lopt_` on a batch of tensors, each with its own network: a test holds the two equal.

    w, g: (many, d1, d0) or (many, n). state: momenta and averages as the rule's, with the batch behind the 3.
    """
    momenta, rms, row, column = [*state, state[-1]][:4]
    beta_m, beta_v, beta_r = decays.T.reshape(7, len(w), *[1] * (w.ndim - 1)).split([3, 1, 3])
    g_sq = g.square()
    momenta.mul_(beta_m).add_((1 - beta_m) * g)
    rms.mul_(beta_v[0]).add_((1 - beta_v[0]) * g_sq)
    factors = None
    if w.ndim == 2:
        row.mul_(beta_r).add_((1 - beta_r) * g_sq)
    else:
        row.mul_(beta_r).add_((1 - beta_r) * g_sq.mean(-1, keepdim=True))
        column.mul_(beta_r).add_((1 - beta_r) * g_sq.mean(-2, keepdim=True))
        factors = row_factor(row, row.mean(-2, keepdim=True))
    x = features(w, g, momenta, rms, row, column, factors).view(FEATURES, len(w), -1).transpose(0, 1)
    mean_squares = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
    weight, bias, *rest = layers
    bias = bias + weight[..., FEATURES:] @ time
    weight = weight[..., :FEATURES] * (mean_squares + 1e-5).rsqrt()[:, None]
    for w2, b2 in zip(rest[::2], rest[1::2], strict=True):
        x = torch.baddbmm(bias[..., None], weight, x).relu_()
        weight, bias = w2, b2
    d, q = torch.baddbmm(bias[..., None], weight, x).unbind(1)
    w.sub_((d * (EXP_MULT * q).exp_()).mul_(STEP_MULT).view(w.shape))


def scaled(found: Tensor, tasks: Tasks) -> Tensor:
    """Mean over steps of the losses over ln(classes); what is not finite counts as the most."""
    return (found / math.log(tasks.kind.classes)).nan_to_num(nan=MOST_LOSS).clamp(max=MOST_LOSS).mean(0)


@torch.no_grad()
def judged(theta: Tensor, like: OptimizerWeights, steps: int, kinds: int = 8, each: int = 4) -> float:
    """The meta-loss of θ over tasks that training never draws."""
    found = []
    for kind in range(kinds):
        tasks = draw_tasks(draw_kind(JUDGED_FROM + kind), each, steps, JUDGED_FROM + kind)
        layers, deltas = unflat(theta.expand(each, -1), like)
        with torch.enable_grad():
            found.append(scaled(Inner(tasks, 1).run(layers, betas(deltas), steps), tasks).mean())
    return float(torch.stack(found).mean())


def outer_gradient(
    theta: Tensor, like: OptimizerWeights, seed: int, *, pairs: int, sigma: float, steps: int, part: int
) -> list[tuple[Tensor, float]]:
    """The gradients and meta-losses of one inner run: one of each, or with `part` < `steps` one for each part."""
    generator = torch.Generator().manual_seed(seed)
    tasks = draw_tasks(draw_kind(seed), pairs, steps, seed)
    inner, summed, found = Inner(tasks, 2), torch.zeros(pairs, len(theta)), []
    for _ in range(steps // part):
        noise = torch.randn(pairs, len(theta), generator=generator)
        summed += noise
        layers, deltas = unflat(torch.cat([theta + sigma * noise, theta - sigma * noise]), like)
        loss = scaled(inner.run(layers, betas(deltas), part), tasks)
        up, down = loss.split(pairs)
        gradient = ((up - down)[:, None] / (2 * sigma) * summed).mean(0)
        found.append((gradient, float(loss.mean())))
    return found


def main() -> None:
    """Trains until the minutes or the outer steps are over, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the .safetensors file to write")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--outer", type=int, default=100_000, help="outer steps at most")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="inner steps")
    parser.add_argument("--persistent", type=int, help="inner steps of a part; all of them unless given")
    parser.add_argument("--sigma", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's, which falls to a tenth as a cosine")
    parser.add_argument("--clip", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.steps % (given.persistent or given.steps) or (given.seed + 1) * given.outer > JUDGED_FROM:
        parser.error("--steps must be a multiple of --persistent, and (seed + 1)·outer at most a million")
    torch.set_num_threads(given.threads)
    theta, like, done = train(given)
    layers, deltas = unflat(theta, like)
    about = {
        "algorithm": "small_fc_lopt (arXiv 2203.11860)",
        "trained_by": "batchlab's scripts/meta_train_optimizer.py: evolution strategies from an Adam-like start",
        "trained_on": "MLPs on digits and random teachers, 90 to 2,410 parameters, batches of 16 to 64",
        "settings": str({key: getattr(given, key) for key in SETTINGS}),
        **{key: str(value) for key, value in done.items()},
    }
    save_weights(given.out, replace(like, layers=tuple(layers), deltas=deltas, about=about))
    print(about)


def train(given: argparse.Namespace) -> tuple[Tensor, OptimizerWeights, dict[str, Any]]:
    """θ, the weights it has the shape of, and what is to be said of the run."""
    like = first_weights(given.seed)
    theta = flat(like)
    start = judged(theta, like, given.steps)
    print(f"start: held-out meta-loss {start:.4f}, {len(theta)} numbers", flush=True)
    adam = torch.optim.Adam([theta], lr=given.rate, betas=(0.9, 0.99))
    began, outer, norms, recent = time.monotonic(), 0, [], []
    while outer < given.outer and (share := (time.monotonic() - began) / (60 * given.minutes)) < 1:
        share = max(share, outer / given.outer)
        part = given.persistent or given.steps
        seed, settings = given.seed * given.outer + outer, {"pairs": given.pairs, "sigma": given.sigma}
        found = outer_gradient(theta, like, seed, **settings, steps=given.steps, part=part)
        for gradient, loss in found:
            norms, recent = [*norms[-49:], float(gradient.norm())], [*recent[-49:], loss]
            theta.grad = gradient * min(1.0, given.clip * statistics.median(norms) / max(norms[-1], 1e-12))
            adam.param_groups[0]["lr"] = given.rate * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
            adam.step()
        outer += 1
        if outer % 50 == 0:
            held = judged(theta, like, given.steps)
            seconds = time.monotonic() - began
            print(f"{outer} {seconds:.0f} s: train {statistics.mean(recent):.4f}, held-out {held:.4f}", flush=True)
    end = judged(theta, like, given.steps)
    said = {"outer_steps": outer, "held_out_meta_loss_at_start": round(start, 4), "held_out_meta_loss": round(end, 4)}
    return theta, like, said


if __name__ == "__main__":
    main()
