"""Every optimizer keeps the contract of `batchlab.testing.optimizers`."""

import pytest

from batchlab.testing.optimizers import CHECKS, compiled_equals_the_loop, lists_equal_the_loop
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
