"""MT-AdamW: its limit, its means, plain loops, tasks that leave parameters out, skipped steps, ranks, refusals."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.mt_adamw import MTAdamW
from batchlab.testing.optimizers import compiled_equals_the_loop, same, small_model
from tests.optim.grouped import in_turn
from tests.spine.forked import in_ranks

THREE = {"a": 0.6, "b": 0.3, "c": 0.1}
STRONG = {"a": 1.0, "b": 1.0, "c": 2.0}
SHAPES = ((5, 3), (4,), ())


def draws(steps, ratios, seed=0):
    """The task of each step."""
    generator = np.random.default_rng(seed)
    return generator.choice(list(ratios), size=steps, p=list(ratios.values())).tolist()


def gradients(ws, t, task):
    """Of a quadratic with a centre for each task, and noise."""
    noise = np.random.default_rng(100 + t)
    size = {"a": 1.0, "b": 10.0, "c": 100.0}[task]
    return [size * ((i + 1) * (w - 0.3 * size**0.1) + 0.5 * noise.normal(size=w.shape)) for i, w in enumerate(ws)]


def weights():
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) for shape in SHAPES]


def run(optimizer_of, tasks, scale=lambda task: 1.0):
    parameters = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights()]
    optimizer = optimizer_of(parameters)
    for t, task in enumerate(tasks):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - 0.9 * t / len(tasks))
        for p, g in zip(parameters, gradients([p.detach().numpy() for p in parameters], t, task), strict=True):
            p.grad = torch.tensor(g * scale(task), dtype=torch.float64)
        optimizer.step(task=task)
    return [p.detach() for p in parameters]


def naive(tasks, *, weights_of=STRONG, ratios=THREE, betas=(0.9, 0.99), eps=1e-8, decay=0.1, cap=math.inf):
    ws, (b1, b2) = weights(), betas
    ms, ns = [0 * w for w in ws], [0 * w for w in ws]
    for t, task in enumerate(tasks, 1):
        eta = 0.05 * (1 - 0.9 * (t - 1) / len(tasks))
        gs = gradients(ws, t - 1, task)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gs))
        visits = min(1 / ratios[task], cap)
        for i, g in enumerate(gs):
            g = weights_of[task] * g / norm
            ms[i] = b1 * ms[i] + (1 - b1) * visits * g
            ns[i] = b2 * ns[i] + (1 - b2) * visits * g**2
            step = ms[i] / (1 - b1**t) / (np.sqrt(ns[i] / (1 - b2**t)) + eps)
            ws[i] = ws[i] - eta * (step + decay * ws[i])
    return [torch.tensor(w, dtype=torch.float64) for w in ws]


def test_one_task_with_the_norm_for_its_weight_is_adamw():
    """K = 1, s = 1, ω = |g|: the normalisation is off."""
    ours = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights()]
    plain = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights()]
    options = {"lr": 0.05, "betas": (0.8, 0.99), "weight_decay": 0.1}
    optimizer, base = MTAdamW(ours, ratios={"only": 1.0}, **options), torch.optim.AdamW(plain, **options)
    for t in range(100):
        for one, other, g in zip(ours, plain, gradients([p.detach().numpy() for p in plain], t, "a"), strict=True):
            one.grad = torch.tensor(g, dtype=torch.float64)
            other.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.weights["only"] = torch.stack([p.grad.square().sum() for p in ours]).sum().sqrt().item()
        optimizer.step(task="only")
        base.step()
    same([p.detach() for p in ours], [p.detach() for p in plain], 1e-10)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_hundred_steps_by_plain_loops(cap):
    tasks = draws(100, THREE)
    assert len(set(tasks)) == 3
    options = {"weights": STRONG, "betas": (0.9, 0.99), "weight_decay": 0.1, "cap": cap}
    found = run(lambda p: MTAdamW(p, 0.05, THREE, **options), tasks)
    same(found, naive(tasks, cap=math.inf if cap is None else cap), 1e-12)
    assert (found[0] - naive(tasks, cap=7.0)[0]).abs().max() > 1e-3


def test_the_scale_of_a_loss_leaves_the_trajectory_alone():
    tasks = draws(100, THREE)

    def make(p):
        return MTAdamW(p, 0.05, THREE, eps=0.0)

    same(run(make, tasks, lambda task: 1e4 if task == "b" else 1.0), run(make, tasks), 1e-9)


def long_run_mean(ratios, draws_of, *, weights_of=STRONG, compensated=True, steps=40_000):
    """The average of m over the steps, of three fixed task gradients of sizes 1, 10 and 100, and Σω_k·ghat_k."""
    fixed = {
        task: size * np.random.default_rng(i).normal(size=8) for i, (task, size) in enumerate(zip("abc", (1, 10, 100)))
    }
    hats = {task: g / np.linalg.norm(g) for task, g in fixed.items()}
    given = ratios if compensated else dict.fromkeys(ratios, 1 / 3)
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = MTAdamW([w], 0.0, given, weights_of, betas=(0.998, 0.998), weight_decay=0.0)
    total, ready = torch.zeros(8, dtype=torch.float64), 2_000
    tensors = {task: torch.tensor(g) for task, g in fixed.items()}
    for t, task in enumerate(draws_of):
        w.grad = tensors[task]
        optimizer.step(task=task)
        if t >= ready:
            total += optimizer.state[w]["exp_avg"]
    expected = {task: weights_of[task] * hat for task, hat in hats.items()}
    return (total / (steps - ready)).numpy(), expected


@pytest.mark.slow
def test_the_mean_of_m_is_the_weighted_sum_whatever_the_ratios():
    """40,000 draws: within 3 %, about 4 standard errors; without 1/s_k it follows s."""
    other = {"a": 0.2, "b": 0.3, "c": 0.5}
    for ratios in (THREE, other):
        found, expected = long_run_mean(ratios, draws(40_000, ratios))
        total = sum(expected.values())
        assert np.linalg.norm(found - total) < 0.03 * np.linalg.norm(total)
        found, expected = long_run_mean(ratios, draws(40_000, ratios), compensated=False)
        follows = sum(3 * ratios[task] * each for task, each in expected.items())
        assert np.linalg.norm(found - follows) < 0.03 * np.linalg.norm(follows)
        assert np.linalg.norm(found - total) > 0.3 * np.linalg.norm(total)


def test_the_means_over_one_cycle_do_not_know_the_ratios():
    """β near 1 and tasks in a fixed cycle with exact shares: m and n are the sums to the first order of 1 - β."""
    cycle = ["a"] * 6 + ["b"] * 3 + ["c"]
    hats = {task: np.random.default_rng(i).normal(size=8) for i, task in enumerate("abc")}
    hats = {task: torch.tensor(g / np.linalg.norm(g)) for task, g in hats.items()}
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = MTAdamW([w], 0.0, THREE, STRONG, betas=(0.99999, 0.99999))
    for task in cycle:
        w.grad = hats[task] * 100
        optimizer.step(task=task)
    state = optimizer.state[w]
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        expected = sum((STRONG[task] * hat) ** power for task, hat in hats.items())
        torch.testing.assert_close(state[name] / (1 - 0.99999**10), expected, rtol=1e-3, atol=1e-4)


def heads(inactive, touched):
    """A trunk and two heads; returns the second head, its state and its moves where only the first task is touched."""
    trunk, first, second = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer = MTAdamW([trunk, first, second], 0.1, {"one": 0.5, "two": 0.5}, inactive=inactive, weight_decay=0.0)
    trunk.grad, second.grad = torch.ones(3).double(), torch.ones(3).double()
    optimizer.step(task="two")
    optimizer.zero_grad()
    moved, kept = second.detach().clone(), copy.deepcopy(optimizer.state[second])
    trunk.grad, first.grad = torch.ones(3).double(), torch.ones(3).double()
    second.grad = torch.zeros(3).double() if touched else None
    optimizer.step(task="one")
    assert second.grad is None or touched
    return second.detach() - moved, optimizer.state[second], kept


def test_a_head_that_the_task_leaves_out_decays_or_is_held():
    moved, state, kept = heads("decay", False)
    assert moved.abs().min() > 0.01 and state["step"] == 2
    torch.testing.assert_close(state["exp_avg"], kept["exp_avg"] * 0.9)
    torch.testing.assert_close(state["exp_avg_sq"], kept["exp_avg_sq"] * 0.999)
    with_zeros, same_state, _ = heads("decay", True)
    assert torch.equal(moved, with_zeros) and torch.equal(state["exp_avg"], same_state["exp_avg"])
    moved, state, kept = heads("hold", False)
    assert not moved.any() and state["step"] == 1 and torch.equal(state["exp_avg"], kept["exp_avg"])


def test_steps_without_a_norm_are_skipped_and_counted():
    w = nn.Parameter(torch.ones(3))
    optimizer = MTAdamW([w], 0.1, {"a": 0.5, "b": 0.5})
    w.grad = torch.ones(3)
    optimizer.step(task="a")
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state[w])
    for bad, warned in ((0.0, False), (math.inf, True), (math.nan, False)):
        w.grad = torch.tensor([1.0, bad, 2.0]) if bad else torch.zeros(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert optimizer.step(lambda: 0.5, task="b" if bad else "a") == 0.5
        assert [str(each.message) for each in caught] == (
            ["the gradient of task 'b' has the norm inf: such steps are skipped"] if warned else []
        )
        assert not caught or caught[0].filename == __file__
    assert optimizer.skipped == {"a": 1, "b": 2}
    assert torch.equal(w, before) and all(torch.equal(value, state[name]) for name, value in optimizer.state[w].items())
    fresh = MTAdamW([nn.Parameter(torch.ones(3))], 0.1, {"a": 0.5, "b": 0.5})
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped == {"a": 1, "b": 2}
    assert copy.deepcopy(optimizer).skipped == {"a": 1, "b": 2}
    fresh.load_state_dict(
        torch.optim.AdamW([w], lr=0.1).state_dict() | {"param_groups": fresh.state_dict()["param_groups"]}
    )


def test_with_a_gradient_scaler_and_a_scheduler():
    w = nn.Parameter(torch.ones(3))
    optimizer = MTAdamW([w], 0.1, {"a": 0.5, "b": 0.5})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(w.sum()).backward()
    scaler.step(optimizer, task="a")
    scaler.update()
    schedule.step()
    after = w.detach().clone()
    assert (after != 1).all()
    optimizer.step(task="b")
    assert torch.equal(w, after)


def test_checkpoints_ask_for_state_without_a_task():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_model()
    optimizer = MTAdamW(model.named_parameters(), 0.1, {"a": 1.0})
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"].keys() == dict(model.named_parameters()).keys()
    assert all(state["step"] == 0 for state in optimizer.state.values()) and optimizer.skipped == {"a": 0}
    same([p.detach() for p in model.parameters()], [p.detach() for p in small_model().parameters()])


def _half_a_batch_each():
    """Two ranks under DDP, each with half of every task's batch, are one process with the whole of it."""
    import torch.distributed as dist

    rank = dist.get_rank()

    def train(model, mine):
        optimizer = MTAdamW(model.parameters(), 0.01, {"a": 0.5, "b": 0.5}, inactive="hold")
        for t in range(10):
            generator = torch.Generator().manual_seed(t)
            x = torch.randn(8, 6, generator=generator)[mine]
            y = torch.randn(8, 3, generator=generator)[mine]
            loss = 100 * (model(x) - y).square().mean() if t % 2 else model(x).exp().mean()
            loss.backward()
            optimizer.step(task="ab"[t % 2])
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    alone = copy.deepcopy(model)
    expected = train(alone, slice(None))
    train(nn.parallel.DistributedDataParallel(model), slice(4 * rank, 4 * rank + 4))
    same([p.detach() for p in model.parameters()], expected, 1e-6)


def test_two_ranks_are_one_process(tmp_path):
    assert in_ranks(2, tmp_path, _half_a_batch_each) == [0] * 2


def test_refusals():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match="ratios must give each task's share of the steps"):
        MTAdamW([w], 0.1)
    with pytest.raises(InputError, match=r"ratios\['b'\] must be finite and > 0, got 0"):
        MTAdamW([w], 0.1, {"a": 1.0, "b": 0})
    with pytest.raises(InputError, match=r"weights\['a'\] must be finite and > 0, got -1"):
        MTAdamW([w], 0.1, {"a": 1.0}, {"a": -1})
    with pytest.raises(InputError, match=r"weights must name the tasks of ratios, \['a'\], got \['b'\]"):
        MTAdamW([w], 0.1, {"a": 1.0}, {"b": 1})
    with pytest.raises(InputError, match='inactive must be "decay" or "hold", got \'skip\''):
        MTAdamW([w], 0.1, {"a": 1.0}, inactive="skip")
    with pytest.raises(InputError, match="cap must be finite and > 0, got 0"):
        MTAdamW([w], 0.1, {"a": 1.0}, cap=0)
    with pytest.warns(UserWarning, match="ratios sum to 4, not 1: they were divided by it"):
        optimizer = MTAdamW([w], 0.1, {"a": 1, "b": 3})
    assert optimizer.ratios == {"a": 0.25, "b": 0.75}
    with pytest.warns(UserWarning, match=r"ratios\['b'\] is 0.0005: each of its steps enters with 2e\+03 times"):
        MTAdamW([w], 0.1, {"a": 0.9995, "b": 0.0005})
    w.grad = torch.ones(3)
    for step in (optimizer.step, lambda: optimizer.step(lambda: 1.0)):
        with pytest.raises(InputError, match=r"step needs the task that the gradient is of, as in step\(task='a'\)"):
            step()
    with pytest.raises(InputError, match=r"task must be one of \['a', 'b'\], got 'c'"):
        optimizer.step(task="c")
    w.grad = torch.zeros(3)
    with pytest.raises(InputError, match="step needs the task"):
        optimizer.step()  # zero gradients alone ask for nothing: the rate is not 0
    assert torch.equal(w, torch.ones(3))


@pytest.mark.slow
def test_compiled_rules_equal_the_loop():
    compiled_equals_the_loop(lambda p, **o: in_turn(MTAdamW)(p, lr=0.01, ratios={"a": 0.25, "b": 0.75}, **o))


class Digits:
    """A trunk 64-64-32 with a head for the digit, one for its parity, and features for two noisy views of an image."""

    def __init__(self, seed):
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.data))
        x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
        y = torch.tensor(data.target[order])
        self.train, self.test = (x[:-360], y[:-360]), (x[-360:], y[-360:])
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"class": nn.Linear(32, 10), "parity": nn.Linear(32, 2), "pair": nn.Linear(32, 32)})
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = [*self.trunk.parameters(), *self.heads.parameters()]

    def view(self, x, generator=None):
        """A third of the pixels masked, and noise."""
        generator = generator or self.generator
        kept = torch.rand(x.shape, generator=generator) > 1 / 3
        return x * kept + 0.1 * torch.randn(x.shape, generator=generator)

    def features(self, x):
        return F.normalize(self.heads["pair"](self.trunk(x)), dim=1)

    def loss(self, task, size):
        x, y = self.train
        rows = torch.randint(len(x), (size,), generator=self.generator)
        x, y = x[rows], y[rows]
        if task == "class":
            return F.cross_entropy(self.heads["class"](self.trunk(x)), y)
        if task == "parity":
            return F.cross_entropy(self.heads["parity"](self.trunk(x)), y % 2)
        logits = self.features(self.view(x)) @ self.features(self.view(x)).T / 0.1
        target = torch.arange(size)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def scores(self):
        """Accuracies of class and parity on the test images, and the share of views whose nearest is their pair."""
        x, y = self.test
        hidden, generator = self.trunk(x), torch.Generator().manual_seed(1)
        found = [(self.heads["class"](hidden).argmax(1) == y), (self.heads["parity"](hidden).argmax(1) == y % 2)]
        one, other = (self.features(self.view(x, generator)) for _ in range(2))
        found.append((one @ other.T).argmax(1) == torch.arange(len(x)))
        return [each.float().mean().item() for each in found]


TASKS = ("class", "parity", "pair")
THIRDS = dict.fromkeys(TASKS, 1 / 3)


def learnt(way, lr, seed, *, batch=24, steps=1500):
    job = Digits(seed)
    if way in ("mixed", "unmixed"):
        optimizer = torch.optim.AdamW(job.parameters, lr=lr)
    else:
        optimizer = MTAdamW(job.parameters, lr, THIRDS, {"class": 1.0, "parity": 1.0, "pair": float(way[-1])})
    for task in np.random.default_rng(seed).choice(TASKS, size=steps).tolist():
        optimizer.zero_grad()
        if way == "mixed":
            sum(job.loss(each, batch // 3) for each in TASKS).backward()
        else:
            job.loss(task, batch).backward()
        optimizer.step(**({} if way in ("mixed", "unmixed") else {"task": task}))
    return job.scores()


@pytest.mark.slow
def test_miniature_of_unmixed_batches():
    """Digits at batch 24, three seeds, of three rates the one with the highest geometric mean of the three scores.

    Class, parity and retrieval: mixed 0.948, 0.952, 0.149; unmixed 0.956, 0.958, 0.160; normalised 0.951, 0.960, 0.137;
    with the weight 3 for retrieval 0.944, 0.953, 0.150. The spread of retrieval over seeds is 0.02.
    """
    found = {}
    for way in ("mixed", "unmixed", "weight 1", "weight 3"):
        by_rate = {}
        for lr in (1e-3, 3e-3, 1e-2):
            scores = np.array([learnt(way, lr, seed) for seed in range(3)])
            by_rate[lr] = scores.mean(0)
            print(way, lr, by_rate[lr].round(3), scores.round(3).tolist(), flush=True)
        found[way] = max(by_rate.values(), key=np.prod)
    assert found["unmixed"][2] >= found["mixed"][2] + 0.01  # the margin stated beforehand; met by 0.001
    assert (found["weight 1"][:2] >= found["mixed"][:2]).all()
    assert found["weight 3"][2] > found["weight 1"][2]


def test_ratios_that_are_no_mapping_and_tasks_of_several_kinds():
    w = [nn.Parameter(torch.ones(2))]
    with pytest.raises(InputError, match="ratios must give each task's share of the steps"):
        MTAdamW(w, ratios=["a", "b"])
    with pytest.raises(InputError, match=r"task must be one of \[1, 'a'\], got 'z'"):
        MTAdamW(w, ratios={1: 0.5, "a": 0.5}).step(task="z")
