"""The coordinate check: known slopes exactly, μP flat and one rate for all widths not, and Muon's rates."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.course.coordinate_check import CoordinateCheck, coordinate_check
from batchlab.rules.mup import muon_rate_factor, table

BASE, RATE = 64, 0.003


def mlp(width):
    sizes = (16, width, width, width)
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]  # noqa: RUF007
    return nn.Sequential(*hidden, nn.Linear(width, 10))


class Transformer(nn.Module):
    """One block, two heads. Scores by 1/d_head, as 1/√d_head at the base width."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        n, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (math.sqrt(BASE / 2) / (width / 2))
        x = x + self.mix((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        x = x + self.down(self.up(self.second(x)).relu())
        return self.head(x)


def rules(make, model, embeddings):
    wide = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return table({name: tuple(p.shape) for name, p in make(BASE).named_parameters()}, wide, embeddings=embeddings)


def under_mup(make, embeddings=()):
    """A factory of models that start as μP says, and of their Adam."""
    base = {name: p.detach().std(unbiased=False) for name, p in make(BASE).named_parameters()}

    def build(width):
        model = make(width)
        found = rules(make, model, embeddings)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if base[name] > 0:
                    p.normal_(0, float(base[name]) * math.sqrt(found[name].variance))
        return model

    def adam(model, width):
        found = rules(make, model, embeddings)
        named = model.named_parameters()
        return torch.optim.Adam([{"params": [p], "lr": RATE * found[name].learning_rate} for name, p in named])

    return build, adam


def one_rate(model, width):
    return torch.optim.Adam(model.parameters(), lr=RATE)


def numbers(steps=3):
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 16, generator=random), torch.randint(10, (64,), generator=random)) for _ in range(steps)]


def tokens(steps=3):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(32, (16, 17), generator=random) for _ in range(steps)]


def classify(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def predict_next(model, batch):
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


TASKS = {
    "mlp": (mlp, classify, numbers, (), [64, 128, 256, 512], {"2", "4", "6"}),
    "transformer": (Transformer, predict_next, tokens, ("embed.weight",), [64, 128, 256], {"qkv", "up", "head"}),
}


@pytest.mark.parametrize("name", TASKS)
def test_mup_is_flat_and_one_rate_for_all_widths_is_not(name):
    """0.25 is halfway between μP and the mildest mistake, a root of the width."""
    make, loss, data, embeddings, widths, moved = TASKS[name]
    build, adam = under_mup(make, embeddings)
    flat = coordinate_check(build, adam, loss, data(), widths=widths)
    steep = coordinate_check(make, one_rate, loss, data(), widths=widths)
    assert flat.flat() and abs(flat.steepest.slope.value) < 0.25
    assert not steep.flat()
    slopes = {each.module: each.slope for each in steep.coordinates if each.step == 1}
    for module in moved:
        assert slopes[module].low > 0.5, module
    first = "0" if name == "mlp" else "embed"
    assert abs(slopes[first].value) < 0.05


class Both:
    """Muon for hidden matrices, Adam for the rest."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for each in self.optimizers:
            each.zero_grad()

    def step(self):
        for each in self.optimizers:
            each.step()


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_by_its_own_factor_and_not_by_adams_row(scale):
    """A spectral norm of 0.1 a step at the base width, so that the hidden layers move most by it. As above: 0.25."""
    build, _ = under_mup(mlp)

    def rates(factor):
        def make(model, width):
            found = rules(mlp, model, ())
            hidden = [p for name, p in model.named_parameters() if name in ("2.weight", "4.weight")]
            rest = [
                {"params": [p], "lr": RATE * found[name].learning_rate}
                for name, p in model.named_parameters()
                if name not in ("2.weight", "4.weight")
            ]
            lr = 0.1 / (1.0 if scale == "original" else 0.2 * math.sqrt(BASE)) * factor(width / BASE)
            muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn=scale)
            return Both(muon, torch.optim.Adam(rest))

        return make

    def check(factor):
        found = coordinate_check(build, rates(factor), classify, numbers(2), widths=[64, 128, 256], modules=["2", "4"])
        return {each.module: each.slope.value for each in found.coordinates if each.step == 1}

    right = check(lambda ratio: muon_rate_factor(ratio, ratio, scale=scale))
    mixed = check(lambda ratio: 1 / ratio)
    assert all(abs(slope) < 0.25 for slope in right.values()), right
    assert all(slope < -0.25 for slope in mixed.values()), mixed
    if scale == "match_rms_adamw":
        assert all(slope > 0.25 for slope in check(lambda ratio: 1.0).values())


def test_exact_slopes_of_a_linear_model():
    """y = Wx, one SGD step on the mean of y's sum: Δ = rate·|x|² for all widths; with the rate ∝ width, slope 1."""
    x = torch.full((4, 3), 2.0, dtype=torch.float64)

    def make(width):
        return nn.Linear(3, width, bias=False).double()

    for power in (0, 1, -2):
        found = coordinate_check(
            make,
            lambda model, width, power=power: torch.optim.SGD(model.parameters(), lr=0.1 * float(width) ** power),
            lambda model, batch: model(batch).sum(1).mean(),
            [x, x],
            widths=[8, 16, 64],
            seeds=2,
        )
        assert [(each.module, each.step) for each in found.coordinates] == [("model", 1), ("model", 2)]
        for each in found.coordinates:
            assert each.changes == pytest.approx([1.2 * width**power for width in (8, 16, 64)])
            assert each.slope.value == pytest.approx(power, abs=1e-9)
            assert each.slope.low <= each.slope.value <= each.slope.high


def test_it_is_reproducible_and_leaves_the_generators_alone():
    def run(seed):
        return coordinate_check(mlp, one_rate, classify, numbers(1), widths=[8, 16, 32], seeds=2, seed=seed)

    before = torch.get_rng_state()
    first = run(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert run(0) == first != run(1)
    assert CoordinateCheck.from_json(first.to_json()) == first
    assert "2 after update 1: 8 " in first.table() and "slope" in first.table()


def test_an_output_that_does_not_change_has_no_slope():
    """Below a readout that starts at zero nothing moves at the first update, and all does at the second."""

    def make(width):
        model = mlp(width)
        nn.init.zeros_(model[6].weight)
        return model

    found = coordinate_check(make, one_rate, classify, numbers(2), widths=[8, 16, 32], modules=["2", "6"])
    slopes = {(each.module, each.step): each.slope for each in found.coordinates}
    assert slopes["2", 1].method == "undefined: an output did not change" and not slopes["2", 1].defined
    assert slopes["6", 1].defined and slopes["2", 2].defined
    assert found.steepest.slope.defined


class Twice(nn.Module):
    """One layer used twice, and one that returns a tuple, in dropout that only training has."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.rnn = nn.Linear(width, width), nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.rnn(self.drop(self.layer(self.layer(x))))[0].sum(-1)


def test_a_module_used_twice_counts_as_one_and_tuples_by_their_first():
    loss = lambda model, batch: model(batch.repeat(1, 1, model.layer.in_features)).square().mean()  # noqa: E731
    found = coordinate_check(Twice, one_rate, loss, [torch.ones(2, 3, 1)], widths=[4, 8, 16], seeds=2)
    assert {each.module for each in found.coordinates} == {"layer", "rnn", "drop"}


def call(**changes):
    arguments = {"make": mlp, "optimizer": one_rate, "loss": classify, "batches": numbers(1), "widths": [8, 16, 32]}
    return coordinate_check(**(arguments | changes))


class Uneven(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(2 if width > 8 else 1)), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": [8, 16]}, r"widths must be at least 3, ascending, got \[8, 16\]"),
        ({"widths": [16, 8, 32]}, r"widths must be at least 3, ascending, got \[16, 8, 32\]"),
        ({"widths": [8, 16, 0.5]}, "widths must be an integer of at least 1, got 0.5"),
        ({"batches": []}, "batches must hold at least one, got none"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"coverage": 95}, r"coverage must lie in \(0, 1\), got 95"),
        ({"modules": ["head"]}, r"modules must be names of modules of the model, got 'head'; it has"),
        ({"make": lambda width: width}, "make must return a torch.nn.Module, got int"),
        ({"make": Uneven}, "models of all widths must have the same modules, layers.2 is not in all"),
        (
            {"optimizer": lambda model, width: torch.optim.SGD(model.parameters(), lr=math.inf)},
            "the outputs of 0 are not finite at width 8: lower its learning rate",
        ),
    ],
)
def test_bad_input_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        call(**changes)


def test_a_check_without_a_change_has_no_answer():
    still = call(optimizer=lambda model, width: torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(InputError, match="no module's output changed: there is no slope"):
        still.flat()
