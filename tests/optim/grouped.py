"""Optimizers that take their gradient in groups, or name a task, driven by a bare `step()` as the contract does."""

import torch

from batchlab.optim.leaf import asks_for_state
from batchlab.parallel.shards import share

GROUPS = 4


def pieces(parameter):
    """Four groups' shares of a gradient, which sum to it: by element, and a function of the weight alone."""
    w = parameter.detach()
    s, t = torch.sin(7 * w) * 0.2, torch.cos(5 * w) * 0.2
    return [(0.25 + each) * parameter.grad for each in (s, -s, t, -t)]


def in_groups(kind):
    """The class with a step that takes the gradient in four groups."""

    class InFour(kind):
        def step(self, closure=None):
            if asks_for_state(self):
                return super().step(closure)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                self.add_group()
            parts = [pieces(p) for p in parameters]
            for index in range(GROUPS):
                for p, part in zip(parameters, parts, strict=True):
                    p.grad = part[index]
                self.add_group()
            super().step()
            return loss

    return InFour


def in_turn(kind):
    """`MTAdamW` for two tasks in turn; a step that it skips for a gradient that is not finite is raised."""

    class InTurn(kind):
        def step(self, closure=None):
            if asks_for_state(self):
                return super().step(closure)
            with torch.enable_grad():
                loss = None if closure is None else closure()
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if not all(g.is_sparse or share(g).part.isfinite().all() for g in gradients):
                raise ValueError("the gradient is not finite")
            steps = max((int(state["step"]) for state in self.state.values()), default=0)
            super().step(task="ab"[steps % 2])
            return loss

    return InTurn
