"""Holding a run folder before there is anything to write in it."""

import multiprocessing

import pytest

from batchlab.core.errors import InputError, RunLockedError
from batchlab.core.store import RunWriter, check_folder, reserved


def _other(folder, answers):
    try:
        with reserved(folder):
            answers.put("held")
    except RunLockedError as error:
        answers.put(str(error))


def asked_elsewhere(folder):
    """What another process gets that wants the folder."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_other, args=(folder, answers))
    child.start()
    child.join(30)
    return answers.get(timeout=5)


def test_nobody_else_gets_a_reserved_folder_and_its_writer_takes_it_over(tmp_path):
    folder = tmp_path / "runs/a"
    with reserved(folder):
        assert "is being written by process" in asked_elsewhere(folder)
        with RunWriter(folder, {"schema": 1}):
            assert "is being written by process" in asked_elsewhere(folder)
    assert (folder / "run.json").exists() and asked_elsewhere(folder) == "held"


def test_where_no_writer_came_nothing_is_left(tmp_path):
    with pytest.raises(KeyError), reserved(tmp_path / "runs/a"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with reserved(tmp_path / "mine"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["file", "file/deeper/run"])
def test_a_file_in_the_folders_place_is_said(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out must name a folder, .* cannot be one: .*file is a file"):
        check_folder(tmp_path / name)
    check_folder(tmp_path / "not/there/yet")
