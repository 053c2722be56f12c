"""Attached to a loop, `GradientNoise` gives the naive pair and leaves the training as it was."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import unbiased_pair
from tests.measure.noise.small import (
    Quadratic,
    TwoHeads,
    naive_pair,
    observed_pair,
    small_batch,
    small_model,
    two_heads_step,
)


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [1, 7, 24], [31, 1]])
def test_a_model_gives_the_naive_pair(sizes, passed):
    model = small_model(dtype=torch.float64)
    assert observed_pair(model, sizes, passed=passed) == pytest.approx(naive_pair(model, sizes), rel=1e-10)


def test_shared_parameters_count_once_and_frozen_ones_not():
    tied = small_model(tied=True, dtype=torch.float64)
    assert observed_pair(tied, [8, 24]) == pytest.approx(naive_pair(tied, [8, 24]), rel=1e-10)
    frozen = small_model(dtype=torch.float64)
    frozen[0].requires_grad_(False)
    assert observed_pair(frozen, [8, 24]) == pytest.approx(naive_pair(frozen, [8, 24]), rel=1e-10)


def test_activation_checkpointing_and_the_compiler_change_nothing():
    model = small_model(dtype=torch.float64)
    expected = pytest.approx(naive_pair(model, [8, 24]), rel=1e-10)
    assert observed_pair(model, [8, 24], forward=lambda x: checkpoint(model, x, use_reentrant=False)) == expected
    model.zero_grad()
    assert observed_pair(model, [8, 24], forward=torch.compile(model, backend="aot_eager")) == expected


def test_under_bf16_autocast():
    model = small_model()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    got = observed_pair(model, [8, 24], torch.float32, forward)
    assert got == pytest.approx(naive_pair(model, [8, 24], torch.float32), rel=0.1)


def test_a_loss_scale_is_taken_out_and_its_overflow_is_a_skipped_step():
    """As in training: scaled passes, unscale_, the noise scale, step, update; the third step overflows."""
    model, plain = small_model(), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    noise, pairs = GradientNoise(model), []
    x, y = small_batch(32, torch.float32)
    for step in range(4):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.split([8, 24]), y.split([8, 24]), strict=True):
            with noise.micro_batch(len(part_x)):
                loss = (model(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / 32
                scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        noise.step()
        pairs.append(noise.pair)
        scaler.step(optimizer)
        scaler.update()
    assert noise.skipped == 1 and pairs.pop(2) is None
    expected = pytest.approx(naive_pair(plain, [8, 24], torch.float32), rel=1e-4)
    assert pairs == [expected] * 3
    assert scaler.get_scale() == 2.0**12  # grew twice before the overflow, halved at it, grew once after


@pytest.mark.parametrize("tied", [False, True])
def test_attaching_changes_no_bit(tied):
    finals = []
    for attached in (False, True):
        model = small_model(tied)
        noise = GradientNoise(model) if attached else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        x, y = small_batch()
        for _ in range(20):
            for piece in range(0, 32, 8):
                with noise.micro_batch(8) if noise else contextlib.nullcontext():
                    ((model(x[piece : piece + 8]).squeeze(1) - y[piece : piece + 8]).square().mean() / 4).backward()
            if noise:
                noise.step()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


def test_one_piece_says_that_there_is_nothing_to_compare():
    noise = GradientNoise(small_model())
    x, y = small_batch()
    with noise.micro_batch(32):
        (noise._parameters[0].sum() * 0 + 1).backward()
    got = noise.step()
    assert math.isnan(got.value) and got.high == math.inf and "one piece a step" in got.method
    del x, y


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e45, 1e150])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad):
    model = Quadratic(3)
    noise = GradientNoise(model)
    for value in (1.0, 2.0, bad, 3.0):
        model.theta.grad = None
        for shift in (0.0, 1.0):
            with noise.micro_batch(2):
                (model(torch.full((2, 3), value + shift, dtype=torch.float64)) / 2).backward()
        noise.step()
    assert noise.skipped == 1 and noise.statistics.count == 3


def test_a_step_after_which_a_run_diverges_is_held_up_to_its_cube():
    model = Quadratic(3)
    noise = GradientNoise(model)
    for step in range(8):
        model.theta.grad = None
        for shift in (0.0, 1.0):
            with noise.micro_batch(2):
                (model(torch.full((2, 3), 10.0 ** (5 * step) + shift, dtype=torch.float64)) / 2).backward()
        assert noise.step().method
    assert noise.skipped == 0


def test_the_state_is_of_plain_numbers_whoever_counted():
    noise = GradientNoise(Quadratic(3), every=np.int64(3))
    for _ in range(2):
        with noise.micro_batch(np.int64(2)):
            pass
        noise.skip()
    assert json.loads(json.dumps(noise.state_dict()))["turn"] == 2


def test_skip_forgets_the_pieces():
    noise = GradientNoise(Quadratic(3))
    with noise.micro_batch(2):
        pass
    noise.skip()
    assert noise.skipped == 1
    with pytest.raises(InputError, match="step needs at least one micro_batch before it"):
        noise.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unbiased_pair(1.0, 1.0, 4, 4), "1 <= small < big, got small=4, big=4"),
        (lambda: unbiased_pair(1.0, 1.0, 0, 4), "1 <= small < big"),
        (
            lambda: GradientNoise(small_model(), method="magic"),
            "method must be one of 'micro_batch', 'per_example', 'norm_layers', 'ranks', got 'magic'",
        ),
        (lambda: GradientNoise(small_model(), ema=1.0), r"ema must lie in \[0, 1\)"),
        (lambda: GradientNoise(nn.Identity()), "no parameter that requires a gradient"),
        (
            lambda: GradientNoise(small_model()).micro_batch(0).__enter__(),
            "examples must be an integer of at least 1, got 0",
        ),
        (lambda: GradientNoise(small_model()).step(), "step needs at least one micro_batch"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_backward_pass_outside_and_a_closed_object_are_told_as_such():
    model = small_model(dtype=torch.float64)
    noise, (x, y) = GradientNoise(model, every=3), small_batch(32, torch.float64)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        with noise.micro_batch(16):
            loss = (model(part_x).squeeze(1) - part_y).square().mean() / 2
        loss.backward()
    with pytest.raises(InputError, match="no backward pass was seen in micro_batch"):
        noise.step()
    noise.close()
    with pytest.raises(InputError, match="this GradientNoise was closed"):
        noise.micro_batch(16)
    noise.skip()
    noise.skip()
    noise.skip()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_state_of_another_method_or_weighting_is_refused():
    model = small_model(dtype=torch.float64)
    state = GradientNoise(model).state_dict()
    with pytest.raises(InputError, match="state is of method 'micro_batch', this is of 'ranks'"):
        GradientNoise(model, "ranks").load_state_dict(state)
    weighed = GradientNoise(model, weighting="preconditioned", optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match="state is of weighting 'none', this is of 'preconditioned'"):
        weighed.load_state_dict(state)


def test_counts_of_any_library_are_integers_and_squared_norms_not_negative():
    model = small_model(dtype=torch.float64)
    noise = GradientNoise(model)
    with noise.micro_batch(np.int64(3)):
        pass
    with pytest.raises(InputError, match="model must be a torch.nn.Module, got generator"):
        GradientNoise(model.parameters())
    noise = GradientNoise(model)
    x, y = small_batch(32, torch.float64)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        with noise.micro_batch(16):
            ((model(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
    with pytest.raises(InputError, match="grad_sq_norm is a squared norm and must be >= 0, got -3"):
        noise.step(-3.0)


def test_a_parameter_that_adam_never_stepped_has_no_part_in_its_geometry():
    model, body = TwoHeads(), TwoHeads().body
    found = []
    for net in (model, body):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        noise = GradientNoise(net, weighting="preconditioned", optimizer=optimizer)
        for seed in range(4):
            two_heads_step(net, noise, seed)
            optimizer.step()
        found.append(noise.pair)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    with pytest.raises(InputError, match="SGD keeps none"):
        sgd = torch.optim.SGD(body.parameters(), lr=0.1)
        GradientNoise(body, weighting="preconditioned", optimizer=sgd)
