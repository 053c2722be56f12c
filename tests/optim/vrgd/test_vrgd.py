"""VRGD: the multiplier's closed forms, its optimizers against plain loops, groups over ranks, refusals."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.vrgd.multiplier import add_group_, add_group_foreach_, multiplier
from batchlab.optim.vrgd.optimizers import VRLAMB, VRLARS, VRSGD, VRAdam
from batchlab.optim.vrgd.vrgd import VRGradient, keep_local
from batchlab.testing.optimizers import compiled_equals_the_loop, same, small_model
from tests.optim.grouped import in_groups
from tests.spine.forked import in_ranks

GAMMA = 0.1
SIZES = (3, 5, 4, 7, 1, 2, 6, 4)
SHAPES = ((5, 3), (2, 3, 3), (4,))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_multiplier(gradients, sizes, gamma=GAMMA, cap=math.inf):
    """From the definition, coordinate by coordinate."""
    n = sum(sizes)
    gbar = sum(size * g for size, g in zip(sizes, gradients, strict=True)) / n
    var = sum(size * (g - gbar) ** 2 for size, g in zip(sizes, gradients, strict=True)) / n
    r = np.minimum(gbar**2 / var, cap)
    return np.clip(r / r.mean(), gamma, 1), gbar


def weights():
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) for shape in SHAPES]


def group_gradients(ws, t, sizes=SIZES):
    """The mean gradient of each group at a step: a quadratic's, with noise that falls with the group's size."""
    noise = np.random.default_rng(100 + t)
    return [
        [(i + 1) * (w - 0.3) + noise.normal(size=w.shape) / math.sqrt(size) for i, w in enumerate(ws)] for size in sizes
    ]


def feed(parameters, optimizer, groups, sizes=SIZES):
    """Each group's share of the batch's gradient, one after the other."""
    for gradients, size in zip(groups, sizes, strict=True):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g * size / sum(sizes)).to(p.dtype)
        optimizer.add_group(examples=size)


def run(make, steps=100, scale=1.0, rates=None):
    parameters = [nn.Parameter(torch.tensor(w)) for w in weights()]
    optimizer = make(parameters)
    for t in range(steps):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates(t)
        groups = group_gradients([p.detach().numpy() for p in parameters], t)
        feed(parameters, optimizer, [[g * scale for g in each] for each in groups])
        optimizer.step()
    return [p.detach() for p in parameters]


@settings(max_examples=30)
@given(k=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_the_multiplier_is_its_definition(k, seed):
    gradients, sizes = randn(k, 6, 5, seed=seed), (np.arange(k) % 3 + 1.0).tolist()
    expected, _ = naive_multiplier(gradients.numpy(), sizes)
    torch.testing.assert_close(multiplier(gradients, sizes), torch.tensor(expected), rtol=1e-10, atol=1e-12)


def test_two_groups_in_closed_form():
    """r = ((a + b)/(a - b))², over its mean; an upper limit holds before the mean is taken."""
    a, b = randn(2, 1000, seed=1)
    raw = ((a + b) / (a - b)) ** 2
    expected = (raw / raw.mean()).clamp(GAMMA, 1)
    torch.testing.assert_close(multiplier(torch.stack([a, b])), expected, rtol=1e-12, atol=1e-12)
    capped = raw.clamp(max=4.0)
    expected = (capped / capped.mean()).clamp(GAMMA, 1)
    torch.testing.assert_close(multiplier(torch.stack([a, b]), cap=4.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 5, 8, 31])
def test_groups_that_agree_leave_the_base_optimizer(k, dtype):
    """var = 0 within rounding: r is 1 where gbar is not 0, and γ where it is; nothing is NaN."""
    g = randn(40, 50).to(dtype) * 1e-8
    g[:5] = 0
    expected = torch.ones_like(g).masked_fill(g == 0, GAMMA)
    assert torch.equal(multiplier(g.expand(k, 40, 50)), expected)
    ours, plain = nn.Parameter(torch.ones(40, 50, dtype=dtype)), nn.Parameter(torch.ones(40, 50, dtype=dtype))
    optimizer, base = VRSGD([ours], lr=1e7), torch.optim.SGD([plain], lr=1e7)
    for _ in range(k):
        for p in (ours, plain):
            p.grad = g.clone() if p.grad is None else p.grad + g
        optimizer.add_group()
    optimizer.step()
    base.step()
    assert torch.equal(ours, plain) and (ours != 1).any()


def test_one_group_that_agrees_stays_out_of_the_mean():
    gradients = randn(8, 30, seed=2)
    with_one = torch.cat([gradients, torch.full((8, 1), 3.0, dtype=torch.float64)], 1)
    found = multiplier(with_one)
    assert found[-1] == 1
    torch.testing.assert_close(found[:-1], multiplier(gradients), rtol=1e-12, atol=0)


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
    return 0.05 * (1 - 0.9 * t / 100)


def naive(kind, steps=100, raw=False, decay=0.1):
    """The optimizers from their formulas, over NumPy arrays."""
    ws = weights()
    ms, vs, ps = ([0 * w for w in ws] for _ in range(3))
    for t in range(1, steps + 1):
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


def test_the_scale_of_a_tensor_leaves_r_alone():
    gradients = randn(8, 20, 30, seed=3)
    for c in (1e-12, 3.7, -1e9):
        torch.testing.assert_close(multiplier(gradients * c), multiplier(gradients), rtol=1e-12, atol=0)


def test_r_tells_signal_from_noise():
    """100 coordinates of mean 1 and 900 of mean 0, unit noise in each of 8 groups: 0.95 and 0.38 on average."""
    found = []
    for seed in range(20):
        gradients = randn(8, 1000, seed=seed)
        gradients[:, :100] += 1
        r = multiplier(gradients)
        found.append((r[:100].mean().item(), r[100:].mean().item()))
    signal, noise = np.array(found).T
    assert signal.min() > 0.85 and noise.max() < 0.5
    assert abs(signal.mean() - 0.95) < 0.02 and abs(noise.mean() - 0.38) < 0.02


def test_gradients_that_vanish_when_divided_or_squared_are_no_nan():
    gradients = torch.tensor([[1e-45, 1e-30, 1.0, -2.0], [0.0, 2e-30, 2.0, 1.0], [0.0, 3e-30, 3.0, 3.0]])
    assert (gradients.sum(0) != 0).all() and (gradients.sum(0) / 3)[0] == 0
    assert multiplier(gradients).tolist() == [pytest.approx(GAMMA), 1.0, 1.0, pytest.approx(GAMMA)]


def test_lists_take_the_loops_sums():
    gradients = randn(4, 3, 5, seed=4)
    one, lists = torch.zeros(2, 3, 5).double(), torch.zeros(2, 3, 5).double()
    for index, g in enumerate(gradients):
        add_group_(*one, g, examples=2.0, before=2.0 * index)
        add_group_foreach_([lists[0]], [lists[1]], [g], examples=2.0, before=2.0 * index)
    torch.testing.assert_close(lists, one, rtol=1e-14, atol=0)


def test_a_parameter_that_a_group_leaves_out_counts_as_zero():
    found = []
    for zeros in (False, True):
        w, other = nn.Parameter(torch.zeros(30).double()), nn.Parameter(torch.zeros(2).double())
        vr = VRGradient([("w", w), ("other", other)])
        for index, g in enumerate(randn(8, 30, seed=5)):
            w.grad = g if index in (2, 3, 6) else torch.zeros_like(g) if zeros else None
            other.grad = torch.ones(2).double()
            vr.add_group(examples=index + 1)
        vr.finish()
        found.append(w.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert found[0].any()


def test_the_report_says_what_r_was():
    gradients = randn(8, 40, seed=6)
    w, still = nn.Parameter(torch.zeros(40).double()), nn.Parameter(torch.zeros(3))
    optimizer = VRSGD([("w", w), ("still", still)], lr=1.0)
    for g in gradients:
        w.grad = g / 8
        optimizer.add_group()
    optimizer.step()
    r = multiplier(gradients)
    found = optimizer.report()
    assert found.keys() == {"w"} and still.grad is None
    assert found["w"] == pytest.approx({"multiplier": r.mean().item(), "at_gamma": (r == GAMMA).double().mean().item()})
    torch.testing.assert_close(w.detach(), -r * gradients.mean(0), rtol=1e-12, atol=1e-15)


def test_half_precision_is_rounded_once():
    gradients = randn(8, 200, seed=7).bfloat16()
    w = nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
    vr = VRGradient([w])
    for g in gradients:
        w.grad = g.clone()
        vr.add_group()
    vr.finish()
    expected = (multiplier(gradients.double()) * gradients.double().sum(0)).bfloat16()
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad, expected, rtol=2**-8, atol=0)
    assert (w.grad == expected).double().mean() > 0.99


def test_a_gradient_that_is_not_finite_stays_so_and_leaves_the_momentum_of_r():
    w = nn.Parameter(torch.zeros(30).double())
    optimizer = VRAdam([w], lr=0.1)
    for bad in (None, math.nan, math.inf):
        for index, g in enumerate(randn(8, 30, seed=8)):
            w.grad = g.clone()
            if bad is not None and index == 3:
                w.grad[5] = bad
            optimizer.add_group()
        optimizer.finish()
        if bad is None:
            kept = copy.deepcopy(optimizer.state[w])
        else:
            assert not w.grad[5].isfinite()
        optimizer.zero_grad()
    assert torch.equal(kept["multiplier_avg"], optimizer.state[w]["multiplier_avg"])
    assert kept["multiplier_weight"] == optimizer.state[w]["multiplier_weight"] == pytest.approx(0.1)


def test_with_a_gradient_scaler():
    """finish, unscale, clip, step: the scale leaves no trace, and an overflow skips the step."""
    ends = []
    for scaled in (False, True):
        parameters = [nn.Parameter(torch.tensor(w).float()) for w in weights()]
        optimizer = VRAdam(parameters, lr=0.01, second_moment="raw")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for t in (0, 1, 2):
            for index, gradients in enumerate(group_gradients([p.detach().numpy() for p in parameters], t)):
                loss = sum((p * torch.tensor(g).float()).sum() for p, g in zip(parameters, gradients, strict=True))
                loss = loss * (math.inf if t == 1 and scaled and index == 4 else 1.0)
                scaler.scale(loss).backward()
                optimizer.add_group()
            if t == 1 and not scaled:
                optimizer.zero_grad()
                continue
            optimizer.finish()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([p.detach() for p in parameters])
    same(ends[1], ends[0], 1e-5)


def test_the_momentum_of_r_goes_round():
    def steps(parameter, optimizer, vr, seeds):
        for seed in seeds:
            for g in randn(8, 30, seed=seed):
                parameter.grad = g.clone()
                vr.add_group()
            vr.finish()
            optimizer.step()

    w = nn.Parameter(torch.zeros(30).double())
    optimizer = torch.optim.SGD([w], lr=0.1)
    vr = VRGradient(optimizer, ema=0.9)
    steps(w, optimizer, vr, range(3))
    v = nn.Parameter(w.detach().clone())
    resumed = torch.optim.SGD([v], lr=0.1)
    fresh = VRGradient(resumed, ema=0.9)
    fresh.load_state_dict(copy.deepcopy(vr.state_dict()))
    steps(w, optimizer, vr, range(3, 6))
    steps(v, resumed, fresh, range(3, 6))
    assert torch.equal(w, v)
    assert vr.state_dict()["0"].keys() == {"multiplier_avg", "multiplier_weight"}
    with pytest.raises(InputError, match=r"the state of parameter 0 has the shape \(30,\), not \(4,\)"):
        VRGradient([nn.Parameter(torch.zeros(4))]).load_state_dict(vr.state_dict())
    with pytest.raises(InputError, match="the state is of parameter '7', but there are 1 parameters"):
        fresh.load_state_dict({"7": {}})


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


def backward(model, x, y, share):
    ((model(x) - y).square().mean() * share).backward()


def line(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def pieces(step, dtype=torch.float32):
    """Eight micro-batches of a step, of unequal sizes, and the examples in all."""
    x, y = randn(40, 6, seed=50 + step).to(dtype), randn(40, 3, seed=90 + step).to(dtype)
    sizes = (6, 4, 3, 7, 5, 5, 8, 2)
    return list(zip(x.split(sizes), y.split(sizes), strict=True)), 40


RANKED = {"sgd": lambda p, **o: VRSGD(p, lr=0.1, **o), "adam": lambda p, **o: VRAdam(p, lr=0.01, **o)}


def in_one_process(make):
    model = line()
    optimizer = make(model.parameters(), groups=8)
    for step in range(5):
        micro, total = pieces(step)
        for x, y in micro:
            backward(model, x, y, len(x) / total)
            optimizer.add_group(examples=len(x))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def _own_gradients():
    """Four ranks of unequally many groups: plain models, and DDP with `keep_local` or `no_sync`."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [(0, 1, 2), (3,), (), (4, 5, 6, 7)][rank]
    even = [(0, 1), (2, 3), (4, 5), (6, 7)][rank]
    for name, make in RANKED.items():
        expected = in_one_process(make)
        for how in ("plain", "keep_local", "no_sync"):
            model = line()
            optimizer = make(model.parameters(), groups=8, process_group=dist.group.WORLD)
            wrapped = model if how == "plain" else nn.parallel.DistributedDataParallel(model)
            if how == "keep_local":
                wrapped.register_comm_hook(None, keep_local)
            for step in range(5):
                micro, total = pieces(step)
                for index in mine if how == "plain" else even:
                    x, y = micro[index]
                    share = len(x) * world / total  # DDP's mean over ranks takes the number of ranks out again
                    if how == "no_sync":
                        with wrapped.no_sync():
                            backward(wrapped, x, y, share)
                    else:
                        backward(wrapped, x, y, share)
                    optimizer.add_group(examples=len(x))
                optimizer.step()
                optimizer.zero_grad()
            same([p.detach() for p in model.parameters()], expected, 1e-6)
            assert optimizer.report().keys() == {
                f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(model.parameters())
            }, name
    _gradients_that_were_averaged()
    _one_rank_without_a_parameter()


def _gradients_that_were_averaged():
    import contextlib

    import torch.distributed as dist

    for last_only in (False, True):
        model = nn.parallel.DistributedDataParallel(line())
        vr = VRGradient(model.named_parameters(), process_group=dist.group.WORLD)
        micro, _ = pieces(dist.get_rank())
        for index, (x, y) in enumerate(micro[:3]):
            with model.no_sync() if last_only and index < 2 else contextlib.nullcontext():
                backward(model, x, y, 1.0)
            vr.add_group(examples=len(x))
        with pytest.raises(InputError, match="all ranks have the same gradient, averaged before"):
            vr.finish()


def _one_rank_without_a_parameter():
    """What no group of a rank touches counts as 0 there, and what none touches stays without a gradient."""
    import torch.distributed as dist

    rank = dist.get_rank()
    gradients = randn(4, 30, seed=11)
    w, v, u = (nn.Parameter(torch.zeros(30).double()) for _ in range(3))
    vr = VRGradient([w, v, u], process_group=dist.group.WORLD)
    w.grad = gradients[rank]
    v.grad = gradients[rank] if rank == 2 else None
    vr.add_group()
    vr.finish()
    torch.testing.assert_close(w.grad, multiplier(gradients) * gradients.mean(0), rtol=1e-10, atol=1e-12)
    alone = torch.zeros_like(gradients)
    alone[2] = gradients[2]
    torch.testing.assert_close(v.grad, multiplier(alone) * alone.mean(0), rtol=1e-10, atol=1e-12)
    assert u.grad is None


def test_groups_of_four_ranks_are_those_of_one_process(tmp_path):
    assert in_ranks(4, tmp_path, _own_gradients) == [0] * 4


def _reduced_gradients():
    """DDP and FSDP2 as they are: the groups are micro-batches, each reduced, and equal one process's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from batchlab.parallel.shards import whole

    rank, world = dist.get_rank(), dist.get_world_size()

    def train(model, make, ranks):
        optimizer = make(model.parameters())
        for step in range(5):
            for index in range(4):
                x, y = randn(8, 6, seed=10 * step + index).float(), randn(8, 3, seed=900 + 10 * step + index).float()
                mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks) if ranks > 1 else slice(None)
                backward(model, x[mine], y[mine], 0.25)
                optimizer.add_group(examples=8)
            optimizer.step()
            optimizer.zero_grad()
        return [whole(p.detach()) for p in model.parameters()]

    for make in RANKED.values():
        expected = train(line(), make, 1)
        model = line()
        train(nn.parallel.DistributedDataParallel(model), make, world)
        same([p.detach() for p in model.parameters()], expected, 1e-6)
        sharded = fully_shard(line(), mesh=init_device_mesh("cpu", (world,)))
        same(train(sharded, make, world), expected, 1e-6)
    with pytest.raises(InputError, match="is spread over ranks, so that no rank has its own gradient"):
        VRGradient(sharded.parameters(), process_group=dist.group.WORLD)
    sharded.set_requires_gradient_sync(False)
    vr = VRGradient(sharded.parameters())
    backward(sharded, torch.ones(2, 6), torch.ones(2, 3), 1.0)
    with pytest.raises(InputError, match="under FSDP2 each must reduce its gradients"):
        vr.add_group()


def test_reduced_micro_batches_are_groups_too(tmp_path):
    assert in_ranks(2, tmp_path, _reduced_gradients) == [0] * 2


def test_refusals():
    w = nn.Parameter(torch.ones(3))
    for bad in (0, 1):
        with pytest.raises(InputError, match=f"the multiplier needs at least two groups, got {bad}"):
            VRGradient([w], groups=bad)
    with pytest.raises(InputError, match="groups must be an integer of at least 2, got 2.5"):
        VRGradient([w], groups=2.5)
    for gamma in (0, -0.1, 1.5, math.nan):
        for make in (VRGradient, lambda p, gamma: VRSGD(p, lr=0.1, gamma=gamma), multiplier_of):
            with pytest.raises(InputError, match=r"gamma must lie in \(0, 1\), got"):
                make([w], gamma=gamma)
    with pytest.raises(InputError, match="cap must be finite and > 0, got 0"):
        VRGradient([w], cap=0)
    with pytest.raises(InputError, match=r"ema must lie in \(0, 1\), got 1"):
        VRGradient([w], ema=1)
    with pytest.raises(InputError, match=r"beta3 must lie in \(0, 1\), got 1"):
        VRAdam([w], beta3=1)
    with pytest.raises(InputError, match='second_moment must be "scaled" or "raw", got \'both\''):
        VRLAMB([w], lr=0.1, second_moment="both")
    with pytest.raises(InputError, match="process_group must be a torch.distributed.ProcessGroup that this rank is in"):
        VRGradient([w], process_group="all")
    with pytest.raises(InputError, match="params must name each parameter once"):
        VRGradient([w, w])
    with pytest.raises(InputError, match="params must be an optimizer, or tensors"):
        VRGradient([])
    with pytest.raises(InputError, match="VRGD takes real parameters, got turns of torch.complex64"):
        VRGradient([("turns", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    with pytest.raises(InputError, match="examples must name each of the 2 groups, got 3"):
        multiplier(torch.ones(2, 4), [1, 2, 3])


def multiplier_of(params, gamma):
    return multiplier(torch.ones(2, 3), gamma=gamma)


def test_steps_that_miss_their_groups_are_refused():
    w = nn.Parameter(torch.ones(3))
    optimizer = VRSGD([("w", w)], lr=0.1, groups=3)
    with pytest.raises(
        InputError, match=r"needs at least two groups, got 0: call add_group\(\) after the backward pass"
    ):
        optimizer.step()
    with pytest.raises(InputError, match="add_group found no gradient: call it after each micro-batch's backward pass"):
        optimizer.add_group()
    w.grad = torch.ones(3)
    with pytest.raises(InputError, match=r"w has a gradient of no group: call add_group\(\)"):
        optimizer.step()
    optimizer.add_group()
    with pytest.raises(InputError, match="needs at least two groups, got 1"):
        optimizer.step()
    w.grad = torch.ones(3)
    with pytest.raises(InputError, match="examples must be given for all groups of a step, or for none"):
        optimizer.add_group(examples=4)
    with pytest.raises(InputError, match="examples must be finite and > 0, got 0"):
        optimizer.add_group(examples=0)
    optimizer.add_group()
    with pytest.raises(InputError, match="the step must have groups=3 groups, got 2 over all ranks"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3))
    optimizer.zero_grad()
    assert optimizer.gradient.added == 0
    for _ in range(3):
        w.grad = torch.ones(3)
        optimizer.add_group(examples=2.5)
    optimizer.step()
    assert not torch.equal(w, torch.ones(3))
    for message in ("w has a gradient of no group", "needs at least two groups, got 0"):
        with pytest.raises(InputError, match=message):
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("second_moment", ["scaled", "raw"])
@pytest.mark.parametrize("kind", [VRAdam, VRLAMB])
def test_compiled_rules_equal_the_loop(kind, second_moment):
    compiled_equals_the_loop(lambda p, **o: in_groups(kind)(p, lr=0.01, second_moment=second_moment, **o))


def noisy_digits(seed):
    """Train and test images with a fifth of all labels drawn anew, and the test labels as they were."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(data.data))
    x, y = torch.tensor(data.data[order] / 16, dtype=torch.float32), data.target[order]
    noisy = torch.tensor(np.where(generator.random(len(y)) < 0.2, generator.integers(0, 10, len(y)), y))
    return (x[:1437], noisy[:1437]), (x[1437:], noisy[1437:]), torch.tensor(y[1437:])


def classified(kind, rate, seed, *, batch=718, k=8, epochs=60):
    """Softmax regression: test accuracy, the gap (noisy test loss - train loss), the train loss."""
    (x, y), (x_test, noisy), clean = noisy_digits(seed)
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = kind(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    loss = nn.functional.cross_entropy
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(batch)[: len(x) // batch]:
            for group in rows.tensor_split(k) if kind is VRSGD else (rows,):
                (loss(model(x[group]), y[group]) * (len(group) / len(rows))).backward()
                if kind is VRSGD:
                    optimizer.add_group(examples=len(group))
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        trained, predicted = loss(model(x), y).item(), model(x_test)
        accuracy = (predicted.argmax(1) == clean).float().mean().item()
        return accuracy, loss(predicted, noisy).item() - trained, trained


@pytest.mark.slow
def test_miniature_of_large_batches_of_noisy_digits():
    """Five rates, five seeds. The gap is smaller in all seeds at 1 and 3, and the accuracy higher at 3, past the best.

    At 0.3 the gaps are equal within 0.003, twice the standard error. At 10 and 30 accuracies spread by 0.1 over seeds,
    more than they differ (0.70 against 0.73, 0.75 against 0.71). So no sign is claimed there. The gap is no smaller at
    equal train loss: r acts as a shorter step.
    """
    found = {
        (kind, rate): np.array([classified(kind, rate, seed) for seed in range(5)])
        for kind in (torch.optim.SGD, VRSGD)
        for rate in (0.3, 1.0, 3.0, 10.0, 30.0)
    }
    for (kind, rate), each in found.items():
        print(kind.__name__, rate, each.mean(0).round(3), each.round(3).tolist())
    wider = {rate: found[VRSGD, rate][:, 1] - found[torch.optim.SGD, rate][:, 1] for rate in (0.3, 1.0, 3.0)}
    assert abs(wider[0.3].mean()) < 0.005 and (wider[1.0] < 0).all() and (wider[3.0] < 0).all()
    assert found[VRSGD, 3.0][:, 0].mean() > found[torch.optim.SGD, 3.0][:, 0].mean() + 0.01


def fitted(kind, rate, seed, loss, *, batch=2048, k=8, steps=100):
    """Regression with the weights 1 to 10 on uniform inputs, from 0: the loss after each step, of the next batch."""
    generator, truth = torch.Generator().manual_seed(seed), torch.arange(1.0, 11.0)
    w = nn.Parameter(torch.zeros(10))
    optimizer = kind([w], lr=rate)
    course = []
    for _ in range(steps + 1):
        x = torch.rand(batch, 10, generator=generator)
        with torch.no_grad():
            course.append(loss(x @ (w - truth)).item())
        for group in x.chunk(k) if kind is VRSGD else (x,):
            (loss(group @ (w - truth)) * (len(group) / batch)).backward()
            if kind is VRSGD:
                optimizer.add_group(examples=len(group))
        optimizer.step()
        optimizer.zero_grad()
    return course[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [lambda e: e.square().mean().sqrt(), lambda e: e.abs().mean()], ids=["root", "absolute"]
)
def test_miniature_of_a_regression_with_an_unsquared_loss(loss):
    """Each at the best of nine rates, three seeds: VR-SGD is at SGD's last loss after 58 and 68 of 100 steps.

    With the squared loss all hangs on rates within a fifth of the largest stable one, which r raises: the last losses
    at each one's best are 2.8e-5 (SGD, 0.37) and 1.0e-5 (VR-SGD, 0.45), and at 0.316 1.4e-4 and 8e-4.
    """
    courses = {}
    for kind in (torch.optim.SGD, VRSGD):
        by_rate = [np.mean([fitted(kind, 10 ** (i / 4), seed, loss) for seed in range(3)], 0) for i in range(-6, 3)]
        courses[kind] = min(by_rate, key=lambda course: course[-1])
    reached = np.nonzero(courses[VRSGD] <= courses[torch.optim.SGD][-1])[0]
    print(reached[:1] + 1, courses[torch.optim.SGD][-1], courses[VRSGD][-1])
    assert len(reached) and reached[0] + 1 <= 80
