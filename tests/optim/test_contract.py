"""Every optimizer keeps the contract of `batchlab.testing.optimizers`."""

import pytest
import torch

from batchlab.testing.optimizers import (
    CHECKS,
    compiled_equals_the_loop,
    gradients_for,
    lists_equal_the_loop,
    small_model,
)
from tests.optim.cases import CASES, LISTED


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check):
    check(CASES[name])


@pytest.mark.parametrize("name", LISTED)
def test_the_form_for_lists(name):
    lists_equal_the_loop(LISTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_the_compiled_form(name):
    compiled_equals_the_loop(LISTED[name])


def test_the_contract_is_checked_on_the_default_device():
    """As it is on a GPU: nothing of it is on the CPU, where its numbers are drawn."""
    with torch.device("meta"):
        model = small_model()
        gradients_for(model, 0)
    assert all(p.is_meta and p.grad.is_meta and p.shape == p.grad.shape for p in model.parameters())
