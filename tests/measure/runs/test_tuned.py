"""Winners beside the rules."""

import pytest

from batchlab.core.errors import InputError
from batchlab.measure.runs.tuned import TunedSetting, tuned_settings
from tests.core.test_study import study_folder, trial


def test_the_winners_stand_beside_the_linear_and_the_square_root_rule():
    rows = [
        {"batch_size": 64, "learning_rate": 0.2, "momentum": 0.9, "at_edge": True},
        {"batch_size": 16, "learning_rate": 0.1, "momentum": 0.5},
        {"batch_size": 256, "learning_rate": None},
    ]
    first, second = tuned_settings(rows)
    assert first == TunedSetting(16.0, 0.1, 0.5, 0.2, 0.2, 0.2, False)
    assert second.effective_rate == pytest.approx(2.0) and second.at_edge
    assert (second.linear, second.square_root) == (pytest.approx(0.8), pytest.approx(0.4))
    down, base = tuned_settings(rows, base=64)
    assert (down.linear, down.square_root) == (pytest.approx(0.5), pytest.approx(1.0))
    assert base.linear == base.square_root == base.effective_rate
    assert TunedSetting.from_json(first.to_json()) == first


def test_a_study_gives_its_own_winners_and_whether_they_lie_at_an_edge(tmp_path):
    trials = [trial(n, steps=100 - n, batch_size=16) for n in range(5)]
    trials += [trial(n, steps=50 + abs(n - 2), batch_size=64) for n in range(5)]
    trials += [trial(0, "diverged", batch_size=256)]
    small, large = tuned_settings(study_folder(tmp_path, trials))
    assert (small.batch_size, small.learning_rate, small.at_edge) == (16.0, 16.0, True)
    assert (large.batch_size, large.learning_rate, large.at_edge) == (64.0, 4.0, False)
    assert large.momentum is None and large.effective_rate == 4.0 and large.linear == 64.0


@pytest.mark.parametrize(
    ("rows", "base", "message"),
    [
        ([], None, "study must hold at least one batch size with a winner, got none"),
        ([{"batch_size": 8, "learning_rate": 1}], 16, r"base must be one of the batch sizes \[8\], once, got 16"),
        ([{"batch_size": 8, "learning_rate": 1}] * 2, None, r"batch sizes \[8, 8\], once, got 8"),
        ([{"batch_size": 8, "learning_rate": 1, "momentum": 1.0}], None, "momentum must lie in .0, 1., got 1.0"),
    ],
)
def test_bad_input_is_named(rows, base, message):
    with pytest.raises(InputError, match=message):
        tuned_settings(rows, base=base)
