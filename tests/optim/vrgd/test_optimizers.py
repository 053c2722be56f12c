"""VRSGD, VRAdam, VRLARS and VRLAMB against their bases, plain loops and their compiled rules."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.vrgd.multiplier import multiplier
from batchlab.optim.vrgd.optimizers import VRLAMB, VRLARS, VRSGD, VRAdam
from batchlab.optim.vrgd.vrgd import VRGradient
from batchlab.testing.optimizers import compiled_equals_the_loop, same, small_model
from tests.optim.grouped import in_groups
from tests.optim.vrgd.groups import SIZES, group_gradients, naive_multiplier, randn, weights

STEPS = 100


def feed(parameters, optimizer, groups):
    """Each group's share of the batch's gradient, one after the other."""
    for gradients, size in zip(groups, SIZES, strict=True):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g * size / sum(SIZES))
        optimizer.add_group(examples=size)


def run(make, rates=None):
    """The weights after 100 steps."""
    parameters = [nn.Parameter(torch.tensor(w)) for w in weights()]
    optimizer = make(parameters)
    for t in range(STEPS):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates(t)
        feed(parameters, optimizer, group_gradients([p.detach().numpy() for p in parameters], t))
        optimizer.step()
    return [p.detach() for p in parameters]


BASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05), lambda p: VRSGD(p, lr=0.05, gamma=1), 0.0),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: VRSGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, gamma=1),
        0.0,
    ),
    "lars": (lambda p: LARS(p, lr=2.0), lambda p: VRLARS(p, lr=2.0, gamma=1), 0.0),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        lambda p: VRAdam(p, lr=0.05, weight_decay=0.1, gamma=1),
        1e-12,
    ),
    "adam_raw": (
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: VRAdam(p, lr=0.05, gamma=1, second_moment="raw"),
        1e-12,
    ),
    "lamb": (lambda p: LAMB(p, lr=0.05), lambda p: VRLAMB(p, lr=0.05, gamma=1), 1e-12),
    "lamb_raw": (lambda p: LAMB(p, lr=0.05), lambda p: VRLAMB(p, lr=0.05, gamma=1, second_moment="raw"), 1e-12),
}


@pytest.mark.parametrize("name", BASES)
def test_gamma_of_one_is_the_base_optimizer(name):
    """A hundred steps: bit for bit where no momentum of r stands between."""
    base, ours, tolerance = BASES[name]

    class Accumulated:
        """The base, fed with what the groups' gradients add up to in `.grad`."""

        def __init__(self, optimizer):
            self.optimizer, self.sums, self.param_groups = optimizer, {}, optimizer.param_groups

        def add_group(self, *, examples):
            for p in self.param_groups[0]["params"]:
                self.sums[p] = self.sums[p] + p.grad if p in self.sums else p.grad

        def step(self):
            for p, g in self.sums.items():
                p.grad = g
            self.optimizer.step()
            self.sums = {}

    same(run(ours), run(lambda p: Accumulated(base(p))), tolerance)


def rate(t):
    return 0.05 * (1 - 0.9 * t / STEPS)


def naive(kind, raw=False):
    """The optimizers from their formulas, over NumPy arrays."""
    ws, decay = weights(), 0.1
    ms, vs, ps = ([0 * w for w in ws] for _ in range(3))
    for t in range(1, STEPS + 1):
        groups, eta = group_gradients(ws, t - 1), rate(t - 1)
        for i, w in enumerate(ws):
            r, gbar = naive_multiplier([each[i] for each in groups], SIZES)
            if kind in ("sgd", "lars"):
                ghat = r * gbar
                norms = np.linalg.norm(ghat) + decay * np.linalg.norm(w)
                follows = kind == "lars" and w.ndim > 1
                ratio = np.linalg.norm(w) / norms if follows else 1.0
                step = ratio * (ghat + (decay * w if follows or kind == "sgd" else 0.0))
                ms[i] = 0.9 * ms[i] + (step if kind == "sgd" else eta * step)
                ws[i] = w - (eta * ms[i] if kind == "sgd" else ms[i])
                continue
            ps[i] = 0.9 * ps[i] + 0.1 * r
            ghat = ps[i] / (1 - 0.9**t) * gbar
            ms[i] = 0.9 * ms[i] + 0.1 * ghat
            vs[i] = 0.99 * vs[i] + 0.01 * (gbar if raw else ghat) ** 2
            u = ms[i] / (1 - 0.9**t) / (np.sqrt(vs[i] / (1 - 0.99**t)) + 1e-6)
            follows = kind == "lamb" and w.ndim > 1
            u = u + (decay * w if follows or kind == "adam" else 0.0)
            ratio = np.linalg.norm(w) / np.linalg.norm(u) if follows else 1.0
            ws[i] = w - eta * ratio * u
    return [torch.tensor(w) for w in ws]


ADAM = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
BY_LOOP = {
    "sgd": (lambda p: VRSGD(p, lr=0.05, momentum=0.9, weight_decay=0.1), False),
    "lars": (lambda p: VRLARS(p, lr=0.05, weight_decay=0.1, trust=1.0), False),
    "adam": (lambda p: VRAdam(p, **ADAM), False),
    "adam_raw": (lambda p: VRAdam(p, **ADAM, second_moment="raw"), True),
    "lamb": (lambda p: VRLAMB(p, **ADAM), False),
    "lamb_raw": (lambda p: VRLAMB(p, **ADAM, second_moment="raw"), True),
}


@pytest.mark.parametrize("name", BY_LOOP)
def test_a_hundred_steps_by_plain_loops(name):
    """Groups of unequal sizes, a rate that moves, matrices and a vector, float64."""
    make, raw = BY_LOOP[name]
    same(run(make, rates=rate), naive(name.removesuffix("_raw"), raw=raw), 1e-12)


def test_a_torch_optimizer_takes_the_same_gradient():
    """VRGradient with AdamW is VRAdam, and with SGD VRSGD."""

    class Driven:
        def __init__(self, optimizer, **options):
            self.optimizer, self.vr = optimizer, VRGradient(optimizer, len(SIZES), **options)
            self.param_groups, self.add_group = optimizer.param_groups, self.vr.add_group

        def step(self):
            self.vr.finish()
            self.optimizer.step()
            self.optimizer.zero_grad()

    same(run(lambda p: Driven(torch.optim.AdamW(p, **ADAM), ema=0.9), rates=rate), naive("adam"), 1e-12)
    sgd = run(lambda p: Driven(torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)), rates=rate)
    same(sgd, naive("sgd"), 1e-12)


@pytest.mark.parametrize("kind", [VRSGD, VRAdam, VRLARS, VRLAMB])
def test_a_copy_goes_on_alike_and_hooks_run_once(kind):
    LARS([nn.Parameter(torch.zeros(2))], lr=0.1), LAMB([nn.Parameter(torch.zeros(2))], lr=0.1)  # torch wraps their step
    torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    w = nn.Parameter(randn(4, 5))
    optimizer = kind([w], lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(parameter, taken, seed):
        for g in randn(8, 4, 5, seed=seed):
            parameter.grad = g.clone()
            taken.add_group()
        taken.step()

    step(w, optimizer, 1)
    schedule.step()
    assert calls == [1]
    copied = copy.deepcopy(optimizer)
    twin = copied.param_groups[0]["params"][0]
    step(w, optimizer, 2)
    step(twin, copied, 2)
    assert torch.equal(w, twin)


def test_gamma_is_read_at_each_step():
    """A group of its own γ, and one changed in the middle: γ = 1 is plain SGD at once."""
    w, v = nn.Parameter(torch.zeros(30).double()), nn.Parameter(torch.zeros(30).double())
    optimizer = VRSGD([{"params": [w]}, {"params": [v], "gamma": 1}], lr=1.0)
    gradients = randn(8, 30, seed=9)

    def step():
        for g in gradients:
            w.grad, v.grad = g / 8, g / 8
            optimizer.add_group()
        optimizer.step()

    step()
    torch.testing.assert_close(v.detach(), -gradients.mean(0), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(w.detach(), -gradients.mean(0) * multiplier(gradients), rtol=1e-12, atol=1e-15)
    before = w.detach().clone()
    optimizer.param_groups[0]["gamma"] = 1
    step()
    torch.testing.assert_close(w.detach(), before - gradients.mean(0), rtol=1e-12, atol=1e-15)


def test_checkpoints_ask_for_state_without_groups():
    """torch.distributed.checkpoint's step of zero gradients at a rate of 0 makes the state and moves nothing."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for kind, options in ((VRSGD, {}), (VRSGD, {"momentum": 0.9}), (VRAdam, {}), (VRLAMB, {}), (VRLARS, {})):
        model = small_model()
        optimizer = kind(model.named_parameters(), lr=0.1, **options)
        saved = get_optimizer_state_dict(model, optimizer)
        assert bool(saved["state"]) == (kind is not VRSGD or bool(options))
        same([p.detach() for p in model.parameters()], [p.detach() for p in small_model().parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("second_moment", ["scaled", "raw"])
@pytest.mark.parametrize("kind", [VRAdam, VRLAMB])
def test_compiled_rules_equal_the_loop(kind, second_moment):
    compiled_equals_the_loop(lambda p, **o: in_groups(kind)(p, lr=0.01, second_moment=second_moment, **o))
