"""Every batch sampler of the room against the contract: a new one joins by one line."""

import pytest

from batchlab.data.bucket_batches import BucketBatchSampler
from batchlab.data.length_buckets import LengthBuckets
from batchlab.data.stream_batches import StreamBatches
from batchlab.testing import samplers
from batchlab.testing.samplers import Subject
from tests.spine.forked import in_ranks


def in_buckets(n, **given):
    lengths = [3 + at * 7 % 31 for at in range(n)]
    return BucketBatchSampler(lengths, LengthBuckets([10, 20, 33]), [7, 5, 3], **given)


SUBJECTS = {
    "buckets": Subject(in_buckets, huge=None),
    "buckets, drop_last": Subject(lambda n, **given: in_buckets(n, drop_last=True, **given), "most", huge=None),
    "stream": Subject(lambda n, **given: StreamBatches(n, 16, **given)),
    "stream, ragged": Subject(lambda n, **given: StreamBatches(n, 17, **given), n=241),
    "stream, drop_last": Subject(lambda n, **given: StreamBatches(n, 17, drop_last=True, **given), visits="most"),
    "stream, endless": Subject(lambda n, **given: StreamBatches(n, 17, endless=True, **given)),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("check", samplers.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_contract(name, check):
    check(SUBJECTS[name])


def _each_share():
    for subject in SUBJECTS.values():
        samplers.ranks_share(subject)


def test_ranks_of_a_process_group_share_each_epoch(tmp_path):
    assert in_ranks(2, tmp_path, _each_share) == [0, 0]
