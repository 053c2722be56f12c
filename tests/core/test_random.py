"""Seeds that mean the same everywhere, and generators that are given back."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batchlab.core.random
from batchlab.core.random import derive_seed, preserved_generators, reseed

SEEDS = st.integers(0, 2**64 - 1)


def draws():
    """Of torch, numpy (an odd number of normals, of which it keeps one back) and Python."""
    return torch.randn(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)


def test_a_derived_seed_is_the_same_in_every_version():
    """`printf '7\\x1fupdate\\x1f3' | b2sum -l 64`, read from its least byte up."""
    assert derive_seed(0) == int.from_bytes(bytes.fromhex("842b7d9d43cddf75"), "little")
    assert derive_seed(7, "update", 3) == int.from_bytes(bytes.fromhex("f6d3dc4a5fc30ae9"), "little")


def test_neighbours_have_unrelated_seeds():
    """Each of 64 bits is set in half of 4096 seeds, and differs from the next label's in half: within 5 sigma."""
    seeds = np.array([derive_seed(0, "update", step) for step in range(4097)], dtype=np.uint64)
    for words in (seeds[1:], seeds[1:] ^ seeds[:-1]):
        bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(4096)
    others = {
        derive_seed(*parts) for parts in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "b", "a")]
    }
    assert len(others) == 7 and not others & set(seeds.tolist())


@given(seed=SEEDS, bit=st.integers(0, 31))
def test_reseeding_sets_all_three_and_torch_as_its_own(seed, bit):
    reseed(seed)
    first = draws()
    reseed(seed ^ 1 << bit)
    assert all(one != other for one, other in zip(first, draws(), strict=True))
    reseed(seed)
    assert draws() == first
    torch.manual_seed(seed)
    assert torch.randn(3).tolist() == first[0]


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_the_callers_generators_come_back_whatever_happens(error):
    reseed(3)
    draws()
    with preserved_generators():
        expected = draws()
    try:
        with preserved_generators():
            reseed(99)
            draws()
            with preserved_generators():
                reseed(100)
            if error is not None:
                raise error
    except (KeyError, KeyboardInterrupt):
        assert error is not None
    assert draws() == expected


class _Accelerator:
    """Two devices, whose generators a fork of a process that used them cannot reach."""

    def device_count(self):
        return 2


def test_a_fork_of_a_process_that_used_the_gpu_leaves_its_generators_alone(monkeypatch):
    monkeypatch.setattr(batchlab.core.random, "_accelerator", _Accelerator)
    assert batchlab.core.random._seeded_devices() == range(2)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert batchlab.core.random._seeded_devices() == range(0)
    monkeypatch.undo()
    torch.manual_seed(0)
    expected = draws()[0]
    torch.manual_seed(0)
    with preserved_generators():
        reseed(7)
    assert draws()[0] == expected
