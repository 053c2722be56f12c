import multiprocessing
import os
import signal
import time

import pytest

from batchlab.core.errors import BatchlabError, StorageError
from batchlab.core.jsonl import append_line, keep_lines, read_lines


def _append_many(path, writer, count):
    for number in range(count):
        append_line(path, {"writer": writer, "number": number, "text": "x" * (number % 97)})


def test_ten_processes_appending_a_thousand_lines_each_lose_none(tmp_path):
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, w, 1000)) for w in range(10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    seen = sorted((line["writer"], line["number"]) for line in read_lines(path))
    assert seen == [(w, n) for w in range(10) for n in range(1000)]


def test_a_killed_writer_harms_no_other_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    worker = multiprocessing.get_context("fork").Process(target=_append_many, args=(path, 0, 10**9))
    worker.start()
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.001)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    append_line(path, {"writer": 1, "number": 0})
    lines = list(read_lines(path))
    assert [line["number"] for line in lines[:-1]] == list(range(len(lines) - 1))
    assert lines[-1]["writer"] == 1


@pytest.mark.parametrize("tail", [b'{"a": 1', b'{"a": 1}', b"\0\0\0", b"\xff\xfe"])
def test_a_torn_tail_is_left_out_and_then_cut(tmp_path, tail):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 0})
    with path.open("ab") as file:
        file.write(tail)
    assert list(read_lines(path)) == [{"a": 0}]
    append_line(path, {"a": 2})
    assert list(read_lines(path)) == [{"a": 0}, {"a": 2}]


def test_damage_in_the_middle_names_the_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a": \xff}\n{"a": 2}\n')
    with pytest.raises(BatchlabError, match="damaged in line 2"):
        list(read_lines(path))


def test_keep_lines_cuts_exactly(tmp_path):
    path = tmp_path / "lines.jsonl"
    for number in range(5):
        append_line(path, {"n": number})
    keep_lines(path, 3)
    assert [line["n"] for line in read_lines(path)] == [0, 1, 2]


def test_a_refused_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 0})
    before, write = path.read_bytes(), os.write

    def full(descriptor, data):
        write(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchlab.core.jsonl.os.write", full)
    with pytest.raises(StorageError, match="lines.jsonl: No space left on device; 9 bytes needed"):
        append_line(path, {"b": 1})
    assert path.read_bytes() == before
