"""The search over short runs: against parabolas, at the edge, and where runs diverge."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.learning_rate import choose


@given(
    vertex=st.floats(-4.0, 4.0),
    bend=st.floats(0.05, 2.0),
    floor=st.sampled_from([None, -100.0]),
    ratio=st.sampled_from([1.5, 2.0, 4.0]),
    start=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_vertex_of_a_parabola_is_found(vertex, bend, floor, ratio, start):
    """Of the loss itself where it is not positive, else of its logarithm."""
    asked = []

    def run(rate):
        asked.append(rate)
        square = bend * (math.log2(rate / start) - vertex) ** 2
        return math.exp(square) if floor is None else square + floor

    found = choose(run, start, ratio=ratio, most=30)
    assert math.log2(found.learning_rate / start) == pytest.approx(vertex, abs=1e-6)
    assert not found.at_edge and found.why == f"least loss of {len(asked)} short runs, by a parabola in log rate"
    assert [trial.learning_rate for trial in found.trials] == sorted(asked) and len(set(asked)) == len(asked)
    assert [trial.loss for trial in found.trials] == [run(rate) for rate in sorted(asked)]
    steps = np.diff(np.log([trial.learning_rate for trial in found.trials]))
    assert steps == pytest.approx(math.log(ratio), rel=1e-6)


def falling(rate):
    return 1 / rate


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({"most": 5}, [0.5, 1.0, 2.0, 4.0, 8.0]),
        ({"may_go_on": lambda: False}, [1.0]),
        ({}, [2.0**k for k in range(-1, 8)]),
    ],
)
def test_a_best_that_is_not_enclosed_is_said_to_be_at_the_edge(options, tried):
    found = choose(falling, 1.0, **options)
    assert [trial.learning_rate for trial in found.trials] == tried
    assert (found.learning_rate, found.at_edge) == (tried[-1], True)
    assert found.why == f"least loss of {len(tried)} short runs, at the edge of them"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_run_that_diverged_encloses_the_best_but_bends_no_parabola(bad):
    found = choose(lambda rate: bad if rate > 4 else falling(rate), 1.0)
    assert (found.learning_rate, found.at_edge) == (4.0, False)
    assert found.trials[-1].learning_rate == 8.0


def test_it_goes_down_while_everything_diverges():
    found = choose(lambda rate: math.inf if rate > 0.2 else rate, 1.0, most=5)
    assert found.learning_rate == 2.0**-4 and found.at_edge
    with pytest.raises(InputError, match="not finite at any learning rate that was tried: 0.25, 0.5, 1"):
        choose(lambda _: math.nan, 1.0, most=3)


@pytest.mark.parametrize(("start", "ratio"), [(0.0, 2.0), (math.inf, 2.0), (1.0, 1.0)])
def test_a_bad_search_is_named(start, ratio):
    with pytest.raises(InputError, match=f"start must be > 0 and ratio > 1, got start={start}, ratio={ratio}"):
        choose(falling, start, ratio=ratio)
