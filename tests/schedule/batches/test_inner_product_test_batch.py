"""The inner-product tests' batches: blind to noise across the mean, and the augmented form that is not."""

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments, batch_moments
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch


def decided(control, moments):
    return control.next_batch(1, StepFacts(control.batch_size, control.batch_size, batch_test=moments))


def test_noise_across_the_mean_moves_the_norm_and_the_augmented_test_alone():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(12, 6, generator=generator, dtype=torch.float64) * 0.3 + 1.0
    noise = torch.randn(12, 6, generator=generator, dtype=torch.float64) * 3
    mean = g.mean(0)
    noise -= noise.mean(0)
    noise -= torch.outer(noise @ mean, mean) / (mean @ mean)
    plain, noisy = batch_moments([g]), batch_moments([g + noise])
    makes = {
        "norm": lambda: NormTestBatch(2, eta=0.2, maximum=4096),
        "inner": lambda: InnerProductTestBatch(2, theta=0.05, maximum=4096),
        "augmented": lambda: InnerProductTestBatch(2, theta=0.05, nu=0.2, maximum=4096),
    }
    sizes = {name: (decided(make(), plain), decided(make(), noisy)) for name, make in makes.items()}
    assert sizes["inner"][0] == sizes["inner"][1] > 2
    assert sizes["norm"][1] > 5 * sizes["norm"][0] and sizes["augmented"][1] > 2 * sizes["augmented"][0]


@pytest.mark.parametrize("scale", [1e-60, 1e-3, 1e40])
def test_the_scale_of_the_loss_does_not_matter(scale):
    g = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    for nu in (None, 0.5):
        one, other = (InnerProductTestBatch(2, theta=0.2, nu=nu, maximum=4096) for _ in range(2))
        assert decided(one, batch_moments([g])) == decided(other, batch_moments([g * scale])) > 2
    still = InnerProductTestBatch(16, maximum=512)
    assert decided(still, Moments(16, scale**2, 0.0, 0.0, 0.0)) == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InnerProductTestBatch(8, maximum=64, theta=1.5), r"theta must lie in \(0, 1\), got 1.5"),
        (lambda: InnerProductTestBatch(8, maximum=64, nu=0), "nu must be finite and > 0, got 0"),
        (lambda: InnerProductTestBatch(1, maximum=64), "batch_size must be an integer of at least 2, got 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
