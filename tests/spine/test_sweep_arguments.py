"""Batch sizes are parsed, and what a sweep cannot be made of is refused before anything is written."""

import pytest

from batchlab.core.batch_sizes import parse_batch_sizes
from batchlab.core.errors import InputError
from batchlab.core.job import Target
from tests.spine.sweep_jobs import linear_facts, linear_job, quick


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("16..1024", [16, 32, 64, 128, 256, 512, 1024]),
        ("16,64,200", [16, 64, 200]),
        ("10..100", [16, 32, 64]),
        (" 384, 16..64 , 32", [16, 32, 64, 384]),
        ([64, 16, 64], [16, 64]),
        ("7", [7]),
    ],
)
def test_batch_sizes_are_parsed(text, sizes):
    assert parse_batch_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "integers of at least 1, as in 16,64,200, or a span as in 16..1024, got ''"),
        ("16,,64", "got ''"),
        ("0", "got '0'"),
        ("16-64", "got '16-64'"),
        ("1e3", "got '1e3'"),
        ([16, 0], "got 0"),
        ([True], "got True"),
        ([2.0], "got 2.0"),
        ("33..63", "'33..63' holds no power of two: name the sizes"),
        ("64..16", "'64..16' holds no power of two"),
        ([], "at least one batch size, got none"),
    ],
)
def test_bad_batch_sizes_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_batch_sizes(text)


def test_a_target_met_at_the_start_is_refused(tmp_path):
    target = Target("loss", 1e6)
    with pytest.raises(InputError, match=r"the target loss of 1e\+06 is met before any update"):
        quick(tmp_path, job=linear_job(target=target), facts=linear_facts(target=target))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [16, 201]}, "batch_sizes must be at most the data set's 200 examples, got 201"),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"storage": "not a url"}, "storage must be a database URL, as in postgresql://user@host/name"),
        ({"storage": "oracle9://me:secret@host/db"}, r"storage oracle9://me:\*\*\*@host/db cannot be opened"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "storage sqlite:////nowhere/at/all.db cannot be opened"),
        ({"job": linear_job(optimizer="adamw")}, "facts were measured with the optimizer 'sgd', this job has 'adamw'"),
        ({"job": linear_job(target=Target("loss", 0.7))}, "facts were measured with the target"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        quick(tmp_path / "study", **changes)
    assert not (tmp_path / "study").exists()
