"""The weights' average against other libraries' at one batch size, across a change of it, and of half precision."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.errors import InputError
from batchlab.optim.average import WeightAverage
from batchlab.rules import ema

BATCH, DECAY = 8, 0.97


def half_life(decay=DECAY):
    return ema.half_life_examples(decay, BATCH)


def trained(steps, *averages):
    """A net trained by Adam for so many steps of 8 examples; `averages` take it in after each. Its first weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    start = [p.detach().clone() for p in model.parameters()]
    takers = [make(model) for make in averages]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    weights = []
    for step in range(steps):
        x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
        for taker in takers:
            taker.update(model, BATCH) if isinstance(taker, WeightAverage) else taker.update_parameters(model)
    return start, weights, takers


def test_torchs_average_differs_by_its_first_weights_alone():
    """torch starts with θ₁ at full weight, WeightAverage with nothing: ζ_torch = (1 - ρⁿ)·ζ + ρⁿ·θ₁ (sheet 53, 6)."""
    makers = (
        lambda model: WeightAverage(model, half_life=half_life()),
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    )
    _, weights, (mine, torchs) = trained(100, *makers)
    kept = DECAY**100
    for average, other, first in zip(mine.module.parameters(), torchs.module.parameters(), weights[0], strict=True):
        torch.testing.assert_close((1 - kept) * average + kept * first, other, rtol=1e-6, atol=1e-6)
        assert (average - other).abs().max() > 1e-4  # so that the first weights matter here


def test_the_average_that_starts_from_the_initial_weights():
    """ζ ← ρζ + (1 - ρ)θ from ζ = θ₀, as timm's ModelEmaV2 has it: (1 - ρⁿ)·ζ + ρⁿ·θ₀ (sheet 53, 6)."""
    start, weights, (mine,) = trained(100, lambda model: WeightAverage(model, half_life=half_life()))
    naive = [p.double() for p in start]
    for step in weights:
        naive = [DECAY * z + (1 - DECAY) * p.double() for z, p in zip(naive, step, strict=True)]
    kept = DECAY**100
    for average, first, other in zip(mine.module.parameters(), start, naive, strict=True):
        torch.testing.assert_close((1 - kept) * average.double() + kept * first, other, rtol=1e-6, atol=1e-6)


def averaged(updates, half_life):
    """Over updates of (weight, examples)."""
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(model, half_life=half_life)
    for value, examples in updates:
        nn.init.constant_(model.weight, value)
        average.update(model, examples)
    return average.module.weight.item()


def test_it_means_the_same_when_the_batch_changes_in_the_run():
    """Weights that change every 32 examples: all in updates of 8, or of 8, then 32, then 16, and one of 8 + 24."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    small = [(value, 8) for value in values for _ in range(4)]
    mixed = [(value, 8) for value in values[:20] for _ in range(4)] + [(value, 32) for value in values[20:40]]
    mixed += [(value, 16) for value in values[40:59] for _ in range(2)] + [(values[59], 8), (values[59], 24)]
    assert averaged(mixed, half_life()) == pytest.approx(averaged(small, half_life()), rel=1e-12)


def test_a_switch_of_the_batch_is_the_rules_power():
    """The recursion with ρ up to the switch and ρ^κ after it, from the first weights on; and not with ρ throughout."""
    values = torch.randn(80, generator=torch.Generator().manual_seed(1)).tolist()
    updates = [(value, 8 if step < 40 else 40) for step, value in enumerate(values)]

    def recursion(after):
        mean, weight = 0.0, 0.0
        for step, value in enumerate(values):
            rho = DECAY if step < 40 else after
            mean, weight = rho * mean + (1 - rho) * value, rho * weight + (1 - rho)
        return mean / weight

    found = averaged(updates, half_life())
    assert found == pytest.approx(recursion(ema.scale_decay(DECAY, 5)), rel=1e-12)
    assert abs(found - recursion(DECAY)) > 0.01


class Counting(nn.Module):
    """One weight, an integer buffer and a half-precision one."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones((), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32(dtype):
    """After 3000 updates at 0 one of 1e-4 a time towards 1: 1 - ρ is below half a unit in the last place of 16 bits."""
    model, decay = Counting(dtype), 0.9999
    average = WeightAverage(model, half_life=ema.half_life_examples(decay, BATCH))
    stuck = torch.full((2,), 0.5, dtype=dtype)
    for step in range(4000):
        nn.init.constant_(model.weight, float(step >= 3000))
        model.seen += 1
        model.scale.fill_(step % 7)
        average.update(model, BATCH)
        stuck.lerp_(torch.ones(2, dtype=dtype), 1 - decay)
    assert torch.equal(stuck, torch.full((2,), 0.5, dtype=dtype))  # what an average in 16 bits would do
    expected = (1 - decay**1000) / (1 - decay**4000)
    assert average.module.weight.dtype == dtype
    fine = average.state_dict()["fine"]["weight"]
    torch.testing.assert_close(fine, torch.full((2,), expected), rtol=1e-5, atol=0)
    assert torch.equal(average.module.weight, fine.to(dtype))
    assert average.module.seen.item() == 4000 and average.module.seen.dtype == torch.int64
    assert average.module.scale.item() == 3999 % 7
    assert model.weight.eq(1).all() and model.weight.requires_grad


def test_half_precision_state_goes_round_through_a_checkpoint(tmp_path):
    def run(average, model, steps):
        for step in steps:
            nn.init.constant_(model.weight, math.sin(step))
            average.update(model, BATCH)

    whole, first = Counting(torch.bfloat16), Counting(torch.bfloat16)
    one, two = (WeightAverage(model, half_life=1000.0) for model in (whole, first))
    run(one, whole, range(50))
    run(two, first, range(20))
    save_checkpoint(tmp_path, 1, {"average": two.state_dict()})
    state = load_checkpoint(next(tmp_path.iterdir()))["average"]
    second = Counting(torch.bfloat16)
    resumed = WeightAverage(second, half_life=1000.0)
    resumed.load_state_dict(state)
    run(resumed, second, range(20, 50))
    assert torch.equal(resumed.state_dict()["fine"]["weight"], one.state_dict()["fine"]["weight"])
    assert torch.equal(resumed.module.weight, one.module.weight)
    older = {name: value for name, value in state.items() if name != "fine"}
    resumed.load_state_dict(older)
    assert torch.equal(resumed.state_dict()["fine"]["weight"], two.module.weight.float())
    assert "fine" not in WeightAverage(nn.Linear(1, 1), half_life=1.0).state_dict()


def test_a_model_of_other_shapes_is_refused():
    average = WeightAverage(nn.Linear(3, 1), half_life=10.0)
    with pytest.raises(
        InputError, match=r"model's parameter weight must be of the shape averaged, \(1, 3\), got \(1, 1\)"
    ):
        average.update(nn.Linear(1, 1), 8)
    with pytest.raises(InputError, match="model must have the 2 parameters that are averaged, got 1"):
        average.update(nn.Linear(3, 1, bias=False), 8)
    average.update(nn.Linear(3, 1), 8)
    assert not average.empty
    model = nn.Sequential(nn.Linear(3, 1))
    average = WeightAverage(model, half_life=10.0)
    average.update(model, 8)
    model.append(nn.Linear(1, 1))  # a layer that comes late would be left out
    with pytest.raises(InputError, match="model must have the 2 parameters that are averaged, got 4"):
        average.update(model, 8)
