import os
import stat

import pytest

from batchlab.core.errors import InputError, StorageError
from batchlab.core.files import write_atomic
from batchlab.core.run import Run
from batchlab.core.store import RunWriter


def test_the_order_on_disk_is_fsync_rename_fsync(tmp_path, monkeypatch):
    heard = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            f"batchlab.core.files.os.{name}", lambda *a, f=original, n=name: (heard.append(n), f(*a))[1]
        )
    write_atomic(tmp_path / "a.json", "{}")
    assert heard == ["fsync", "replace", "fsync"]


def test_mode_and_link_of_the_target_stay(tmp_path):
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(tmp_path):
    before = os.umask(0o022)
    try:
        assert stat.S_IMODE(write_atomic(tmp_path / "a", "x").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_refused_write_keeps_the_old_and_names_the_path(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError, match=r"cannot write .*a.json: No space left on device; 5 bytes needed"):
        write_atomic(path, "newer")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_missing_folder_is_made_and_a_file_in_its_place_is_said(tmp_path):
    assert write_atomic(tmp_path / "deep" / "er" / "a", "x").read_text() == "x"
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "deep" / "er" / "a" / "b", "x")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("{}", "does not describe a run")])
def test_what_is_no_run_is_said(tmp_path, text, message):
    with pytest.raises(InputError, match="is not a run folder: it has no run.json"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Run.open(tmp_path)


def test_a_run_from_a_newer_batchlab_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 99, "plan": {}}')
    with pytest.raises(InputError, match="schema 99, from a newer batchlab; this one reads up to 1"):
        Run.open(tmp_path)


def test_a_writer_needs_an_empty_place_or_a_run_to_resume(tmp_path):
    with pytest.raises(InputError, match="nothing to resume: .* has no run.json"):
        RunWriter(tmp_path / "r", {}, resume=True)
    assert not (tmp_path / "r").exists()
    RunWriter(tmp_path / "r", {"schema": 1}).close()
    with pytest.raises(InputError, match=r"already holds a run: resume it \(--resume\), or name another folder"):
        RunWriter(tmp_path / "r", {"schema": 1})
