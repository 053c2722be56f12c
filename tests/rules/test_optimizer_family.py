"""The families against optimizers themselves: equal progress along a weak gradient at two batch sizes, by the rule."""

import math

import numpy as np
import pytest
import torch

from batchlab import optim
from batchlab.core.errors import InputError
from batchlab.optim.by_name import names
from batchlab.rules.learning_rate import for_optimizer, rescale
from batchlab.rules.optimizer_family import FAMILY, decay_kind, family, kind, plain_name

MEAN, EXAMPLES, BATCH, KAPPA = 0.01, 2048, 4, 4
COUNT = 20_000


class Normalised(torch.optim.Optimizer):
    """w <- w - η·√n·g/|g|: a layer of unit weights under LARS, without momentum and decay."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                w.sub_(group["lr"] * math.sqrt(w.numel()) * w.grad / w.grad.norm())


O = torch.optim
MAKE = {
    "sgd": lambda p, lr: O.SGD(p, lr=lr, momentum=0.9),
    "nag": lambda p, lr: O.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "asgd": lambda p, lr: O.ASGD(p, lr=lr),
    "adam": lambda p, lr: O.Adam(p, lr=lr),
    "adamw": lambda p, lr: O.AdamW(p, lr=lr, weight_decay=0.0),
    "rmsprop": lambda p, lr: O.RMSprop(p, lr=lr, alpha=0.9),
    "nadam": lambda p, lr: O.NAdam(p, lr=lr),
    "radam": lambda p, lr: O.RAdam(p, lr=lr, betas=(0.9, 0.95)),
    "adamax": lambda p, lr: O.Adamax(p, lr=lr, betas=(0.9, 0.9)),
    "adafactor": lambda p, lr: O.Adafactor(p, lr=lr, weight_decay=0.0),
    "adagrad": lambda p, lr: O.Adagrad(p, lr=lr),
    "signum": lambda p, lr: optim.Signum(p, lr=lr),
    "lion": lambda p, lr: optim.Lion(p, lr=lr, betas=(0.8, 0.9)),
    "ademamix": lambda p, lr: optim.AdEMAMix(p, lr=lr, betas=(0.9, 0.99, 0.95), alpha=2.0),
    "adagradnorm": lambda p, lr: optim.AdaGradNorm(p, lr=lr * COUNT**0.5),
    "lars": Normalised,
}


def progress(make, lr, batch, mean=None, parameters=10):
    """The move along `mean` over `EXAMPLES`, in units of it, with its standard error over parameters.

    The gradient of each is -mean + N(0, 1/batch).
    """
    mean = torch.full((COUNT // parameters,), MEAN) if mean is None else mean
    random = torch.Generator().manual_seed(batch)
    weights = [torch.nn.Parameter(torch.zeros_like(mean)) for _ in range(parameters)]
    optimizer = make(weights, lr)
    for _ in range(EXAMPLES // batch):
        for w in weights:
            w.grad = -mean + torch.randn(mean.shape, generator=random) / math.sqrt(batch)
        optimizer.step()
    moves = torch.stack([(w.detach() * mean).sum() for w in weights]).double() / float((mean**2).sum())
    return float(moves.mean()), float(moves.std()) / math.sqrt(parameters)


def close(base, larger):
    """The ratio of the two within 10 % and four standard errors of 1: the next rule is off by 2 or more."""
    (a, error_a), (b, error_b) = base, larger
    error = math.hypot(error_a / a, error_b / b)
    assert error < 0.05, "too few coordinates to tell"
    assert abs(b / a - 1) < 0.1 + 4 * error, (a, b)


@pytest.mark.parametrize("name", MAKE)
def test_equal_progress_far_below_the_noise_scale(name):
    """μ²B/σ² is at most 1/600, 1/30 of what a momentum averages, and the updates are many against its memory."""
    rate, rules = 1e-3, {"sgd": "linear", "adam": "sqrt", "adagrad": "none"}
    moved = rescale(rate, BATCH, BATCH * KAPPA, rule=rules[family(name)])
    close(progress(MAKE[name], rate, BATCH), progress(MAKE[name], moved, BATCH * KAPPA))


def test_equal_progress_of_muon():
    """16 by 16 matrices: noise of spectral norm 8/√B, an average momentum's 1.3/√B, around a mean of 0.05."""
    make = lambda p, lr: O.Muon(p, lr=lr, weight_decay=0.0)  # noqa: E731
    rate, mean = 1e-3, 0.05 * torch.eye(16)
    moved = for_optimizer("muon", rate, BATCH, BATCH * KAPPA).learning_rate
    close(progress(make, rate, BATCH, mean, 8), progress(make, moved, BATCH * KAPPA, mean, 8))


def test_lars_own_table_has_the_slopes_that_are_stated():
    """You et al. 2017: batch sizes and best rates of AlexNet, AlexNet-BN and ResNet-50."""
    batches = [512, 4096, 8192, 16384, 32768]
    tables = [(batches, [2, 10, 10, 14, 14]), (batches, [2, 10, 14, 23, 22])]
    tables.append(([256, 1024, 8192, 16384, 32768], [4, 9, 30, 33, 40]))
    slopes = [float(np.polyfit(np.log(sizes), np.log(rates), 1)[0]) for sizes, rates in tables]
    assert [round(slope, 2) for slope in slopes] == [0.48, 0.61, 0.49]
    assert all(f"{slope:.2f}" in kind("lars").why for slope in slopes)


def test_lamb_recipe_is_the_square_root():
    """You et al. 2020: 5/(2^k·1000), k = 3, 2.5, ..., 0 at batch 512, 1024, ..., 32768."""
    for step in range(7):
        found = for_optimizer("lamb", 5e-3, 32768, 512 * 2**step).learning_rate
        assert found == pytest.approx(5 / (2 ** (3 - step / 2) * 1000), rel=1e-12)


def test_every_optimizer_that_batchlab_makes_has_a_family():
    assert {plain_name(name) for name in names()} <= set(FAMILY)
    assert all(kind(name).why and family(name) in ("sgd", "adam", "adagrad") for name in FAMILY)


@pytest.mark.parametrize("name", ["AdamW", "adam_w", "ADAM-W"])
def test_spelling_does_not_count(name):
    assert family(name) == "adam"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prodigy", "optimizer 'prodigy' has no learning-rate rule: it finds its learning rate by itself"),
        ("L-BFGS", "optimizer 'L-BFGS' has no learning-rate rule: it is for gradients of all examples"),
        ("shampoo", 'with averaged statistics it goes as "soap"'),
        ("", r"optimizer must be one of \['adabelief', .*, got '': no learning-rate rule for it"),
        (None, r"optimizer must be one of .*, got None"),
        (["adam"], r"optimizer must be one of .*, got \['adam'\]"),
    ],
)
def test_what_has_no_rule_is_refused(name, said):
    with pytest.raises(InputError, match=said):
        kind(name)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("SGD", "l2"),
        ("Adam", "adaptive_l2"),
        ("AdamW", "decoupled"),
        ("Adamax", "adaptive_l2"),
        ("NAdam", "adaptive_l2"),
        ("RAdam", "adaptive_l2"),
        ("RMSprop", "adaptive_l2"),
        ("Adagrad", "adaptive_l2"),
        ("Adadelta", "adaptive_l2"),
        ("Adafactor", "decoupled"),
        ("Muon", "decoupled"),
    ],
)
def test_kinds_of_decay_are_torchs(name, form):
    """With no gradient, decoupled decay and that of plain steps shrink the weights by 1 - ηλ, others by else."""
    assert decay_kind(name) == form
    rate, decay = 0.01, 0.1
    weight = torch.nn.Parameter(torch.eye(4) * 3)
    optimizer = getattr(torch.optim, name)([weight], lr=rate, weight_decay=decay)
    for _ in range(10):  # RAdam's first five are SGD's
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    shrunk = float(weight.detach()[0, 0]) / 3
    assert (shrunk == pytest.approx((1 - rate * decay) ** 10, rel=1e-5)) == (form in ("decoupled", "l2"))


def test_names_of_decay_are_read_plainly_and_none_is_guessed():
    assert decay_kind("Adam-W") == decay_kind("ADAM_W") == "decoupled"
    assert decay_kind("lamb") == decay_kind("lars") == "normalised" and decay_kind("nag") == "l2"
    assert {decay_kind(name) for name in FAMILY} == {"decoupled", "l2", "adaptive_l2", "normalised", "unknown"}
    for bad in ("garbage", "", None, 3):
        with pytest.raises(InputError, match="optimizer must be"):
            decay_kind(bad)
