"""C code is compiled once, by the compiler there is, and what a compiler says where it fails is told."""

import os
from pathlib import Path

import pytest
import torch

from batchlab.core import c_library
from batchlab.core.errors import InputError
from batchlab.optim import on_cpu

SOURCE = Path(on_cpu.__file__).with_name("kernels.c")


def test_a_library_is_compiled_once_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    c_library.library.cache_clear()
    made = c_library.library(SOURCE, torch.float64)
    assert made is c_library.library(SOURCE, torch.float64) is not c_library.library(SOURCE, torch.float32)
    assert not list(tmp_path.iterdir())


def compiling(monkeypatch, tmp_path, script):
    """Compiles by a compiler that is this shell script."""
    compiler = tmp_path / "cc"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setattr(c_library, "compiler", lambda: (str(compiler),))
    c_library.library.cache_clear()
    try:
        c_library.library(SOURCE, torch.float32)
    finally:
        c_library.library.cache_clear()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho no such luck >&2\nexit 1\n", "no such luck"),
        ("#!/bin/sh\nexit 3\n", "nothing, and ended with 3"),
        (
            '#!/bin/sh\nfor last; do :; done\necho nonsense > "$(echo $* | sed "s/.*-o //; s/ .*//")"\n',
            "file too short",
        ),
        ("no program\n", "Exec format error"),
    ],
)
def test_a_compiler_that_fails_is_told_of(monkeypatch, tmp_path, script, said):
    with pytest.raises(InputError, match=f"fused=True needs a C compiler that works, and .*cc said: .*{said}"):
        compiling(monkeypatch, tmp_path, script)


def test_the_compiler_is_that_of_the_environment(monkeypatch):
    try:
        for given, found in (("sh", ("sh",)), ("sh -x 'a b'", ("sh", "-x", "a b"))):
            monkeypatch.setenv("CC", given)
            c_library.compiler.cache_clear()
            program, *options = c_library.compiler()
            assert (os.path.basename(program), *options) == found
        monkeypatch.setenv("CC", "")
        monkeypatch.setenv("PATH", "")
        c_library.compiler.cache_clear()
        assert c_library.compiler() is None
        assert not on_cpu.takes([torch.ones(2)], [torch.ones(2)])
    finally:
        c_library.compiler.cache_clear()
