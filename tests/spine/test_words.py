"""Numbers in words can be read back to what they were, to the digits that are shown."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.spine.words import aim, duration, figure, interval, moment, plural, size

UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
BINARY = {name: 1024.0**power for power, name in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}


@example(exponent=2.3, sign=1, whole=False)
@given(exponent=st.floats(-6.0, 20.0), sign=st.sampled_from([-1, 1]), whole=st.booleans())
def test_a_figure_has_four_digits_or_all_of_a_whole_number(exponent, sign, whole):
    value = sign * 10.0**exponent
    value = float(round(value)) if whole else value
    text = figure(value)
    read = float(text.replace(",", ""))
    assert read == value if value == int(value) and "e" not in text else read == pytest.approx(value, rel=5.1e-4)
    assert len(text) <= 19


@given(exponent=st.floats(-6.0, 8.0))
def test_a_duration_is_right_to_half_its_lesser_unit(exponent):
    seconds = 10.0**exponent
    parts = duration(seconds).split()
    found = [(float(number), UNITS[unit]) for number, unit in zip(parts[::2], parts[1::2], strict=True)]
    read = sum(number * unit for number, unit in found)
    assert abs(read - seconds) <= (0.5 * found[-1][1] * (1 + 1e-9) if len(found) == 2 else 0.0051 * seconds)
    if len(found) == 2:
        assert found[0][0] >= 1 and found[1][0] * found[1][1] < found[0][1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59.4 s"), (119.7, "2 min 0 s"), (3599.6, "1 h 0 min"), (86_399, "1 d 0 h"), (math.nan, "unknown")],
)
def test_durations_carry_over(seconds, text):
    assert duration(seconds) == text


@given(count=st.one_of(st.just(0.0), st.floats(0.0, 15.0).map(lambda exponent: 10**exponent)))
@example(count=1010.0)
def test_a_size_is_right_to_four_digits_in_the_unit_that_suits_it(count):
    number, unit = size(count).split()
    assert float(number) * BINARY[unit] == pytest.approx(count, rel=5.1e-4)
    assert float(number) < 1024.5 and (float(number) >= 1 or unit == "B")


def test_what_is_not_known_or_not_bounded():
    assert figure(math.nan) == "unknown" and figure(math.inf) == "unbounded"
    assert interval(Estimate(math.nan, 0.0, math.inf, "", 0.9)) == "unknown (90 % interval: 0 to unbounded)"
    assert [moment(text) for text in (None, "yesterday", 3)] == ["at an unknown time", "yesterday", "3"]
    assert moment("2026-11-24T12:00:59") == "2026-11-24 12:00"


def test_targets_and_counts():
    assert aim(Target("loss", 0.5)) == "loss of at most 0.5"
    assert [plural(count, "run") for count in (0, 1, 12_000)] == ["0 runs", "1 run", "12,000 runs"]
