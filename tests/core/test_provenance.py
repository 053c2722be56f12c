"""What is told of a result's origin, held against the system's own tools, in repositories made for it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from batchlab.core.provenance import git_commit, machine, versions


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    """Whatever repository or settings the tests themselves run under."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    for file in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{file}", os.devnull)


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "code").mkdir()
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code/train.py").write_text("pass\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_the_commit_and_whether_files_were_edited(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert len(head) == 40 and git_commit(repository) == git_commit(repository / "code") == head
    (repository / "notes.txt").write_text("not under git\n")
    assert git_commit(repository) == head
    (repository / "code/train.py").write_text("edited\n")
    assert git_commit(repository) == f"{head}+changes"
    git(repository, "add", "--all")
    assert git_commit(repository / "code") == f"{head}+changes"
    git(repository, "commit", "--quiet", "--message", "second")
    assert git_commit(repository) == git(repository, "rev-parse", "HEAD") != head


def test_it_is_that_of_the_users_script_else_of_here(repository, tmp_path_factory, monkeypatch):
    head, elsewhere = git(repository, "rev-parse", "HEAD"), tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(repository / "code/train.py")))
    assert git_commit() == head
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    assert git_commit() is None
    monkeypatch.chdir(repository)
    assert git_commit() == head


def test_there_is_none_outside_git_before_a_commit_and_without_git(tmp_path, repository, monkeypatch):
    assert git_commit(Path(tmp_path.anchor)) is None
    assert git_commit(tmp_path / "missing") is None
    (repository / "inner").mkdir()
    git(repository / "inner", "init", "--quiet")
    assert git_commit(repository / "inner") is None
    assert git_commit(repository) is not None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert git_commit(repository) is None


def test_versions_are_the_installed_ones():
    assert versions() == {
        "batchlab": importlib.metadata.version("batchlab"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }


def test_the_machine_is_told_without_its_name_or_a_path():
    told = machine()
    assert set(told) == {"system", "processor", "cores", "threads", "memory_bytes", "gpus"}
    assert told["system"] == f"{os.uname().sysname} {os.uname().machine}"
    assert told["threads"] == 1  # as set for all tests
    assert len(os.sched_getaffinity(0)) <= told["cores"] and len(told["gpus"]) == torch.cuda.device_count()
    text = json.dumps(told)
    assert platform.node() not in told.values() and str(Path.home()) not in text and os.getcwd() not in text


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_memory_is_in_bytes():
    """The kernel counts KiB; a container may show itself less than there is."""
    shown = 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0.99 * shown <= machine()["memory_bytes"] < 2**50
