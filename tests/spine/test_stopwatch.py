"""A budget that runs down alike on all ranks."""

import json

import pytest
import torch.distributed as dist

from batchlab.spine.stopwatch import Stopwatch
from tests.spine.forked import in_ranks


def test_a_share_of_the_budget_ends_before_the_whole_and_time_only_passes():
    watch = Stopwatch(1000.0)
    quarter, whole, later = watch.left(0.25), watch.left(), watch.left()
    assert 0.0 < quarter <= 250.0 < later <= whole <= 1000.0
    assert Stopwatch(0.0).left() <= 0.0


def _left(folder):
    rank = dist.get_rank()
    watch = Stopwatch([5000.0, 2000.0, 9000.0][rank])
    (folder / str(rank)).write_text(json.dumps([watch.left(), watch.left(0.5)]))


def test_what_is_left_is_the_least_of_the_ranks(tmp_path):
    """To the last bit, so that all of them decide alike."""
    assert in_ranks(3, tmp_path, _left, tmp_path) == [0, 0, 0]
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    assert 0.0 < found[0][1] <= 1000.0 < found[0][0] <= 2000.0


@pytest.mark.parametrize(("fraction", "told"), [(-0.1, 0.0), (0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (7.0, 1.0)])
def test_progress_stays_between_0_and_1(fraction, told):
    seen = []
    Stopwatch(1.0, lambda *what: seen.append(what)).report("noise", fraction)
    assert seen == [("noise", told)]
    Stopwatch(1.0).report("noise", fraction)


def test_a_phase_never_goes_back():
    heard = []
    watch = Stopwatch(10.0, lambda phase, share: heard.append((phase, share)))
    for share in (0.2, 0.6, 0.4, 2.0, -1.0):
        watch.report("one", share)
    watch.report("two", -1.0)
    assert heard == [("one", 0.2), ("one", 0.6), ("one", 0.6), ("one", 1.0), ("one", 1.0), ("two", 0.0)]
