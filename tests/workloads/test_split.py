"""Who is held out depends on names alone, and strata are kept in proportion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.workloads.split import hold_out, name_hash

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def test_name_hash_is_fixed():
    assert name_hash("a") == 0x40F89E395B66422F  # printf a | b2sum -l 64


@given(labels=LABELS, share=st.floats(0.05, 0.95))
def test_parts_are_disjoint_complete_and_in_proportion(labels, share):
    train, valid = hold_out([str(i) for i in range(len(labels))], share, labels)
    assert sorted([*train, *valid]) == list(range(len(labels)))
    assert len(valid) == round(share * len(labels))
    for label in set(labels):
        assert abs(sum(labels[i] == label for i in valid) - share * labels.count(label)) < 1


@given(n=st.integers(1, 60), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
def test_the_order_of_the_names_changes_nothing(n, share, seed):
    names = [f"{i}.png" for i in range(n)]
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(n)]
    one, other = (hold_out(order, share)[1] for order in (names, shuffled))
    assert {names[i] for i in one} == {shuffled[i] for i in other}


@given(n=st.integers(5, 60))
def test_one_more_example_moves_one_at_most(n):
    _, before = hold_out([str(i) for i in range(n)], 0.2)
    _, after = hold_out([str(i) for i in range(n + 1)], 0.2)
    assert len(set(before) - set(after)) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_share_must_lie_between_0_and_1(share):
    with pytest.raises(InputError, match=rf"valid_share must lie in \(0, 1\), got {share}"):
        hold_out(["a", "b"], share)
