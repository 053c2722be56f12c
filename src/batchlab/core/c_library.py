"""C code that comes with batchlab, compiled for this machine when something first asks for it: a second."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from batchlab.core.errors import InputError

REAL = {torch.float32: ("float", "sqrtf", ctypes.c_float), torch.float64: ("double", "sqrt", ctypes.c_double)}
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
_OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)  # there a second runtime beside torch's ends the process
# With OpenMP, else in one thread; for this processor, which not all compilers call by the same name.
WAYS = ((*_OPENMP, "-march=native"), (*_OPENMP, "-mcpu=native"), ("-march=native",), ("-mcpu=native",), ())


@cache
def compiler() -> tuple[str, ...] | None:
    """The C compiler and its options: CC of the environment, else cc, gcc or clang; None where there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in (given, ["cc"], ["gcc"], ["clang"]):
        if command and (found := shutil.which(command[0])):
            return found, *command[1:]
    return None


@cache
def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """A file of C for REAL float32 or float64, SQRT its square root; compiled once in a process, into a folder of its
    own that is removed again. Raises `InputError` with what was said where that fails.
    """
    command, (real, root, _) = compiler() or ("cc",), REAL[dtype]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, said = os.path.join(folder, f"{source.stem}_{real}.so"), ""
        for way in WAYS:
            line = [*command, *FLAGS, *way, f"-DREAL={real}", f"-DSQRT={root}", "-x", "c", "-", "-o", out, "-lm"]
            try:
                done = subprocess.run(
                    line, input=source.read_bytes(), capture_output=True, env=os.environ | {"TMPDIR": folder}
                )
                if done.returncode == 0:
                    return ctypes.CDLL(out)
                said = done.stderr.decode(errors="replace").strip() or f"nothing, and ended with {done.returncode}"
            except OSError as error:  # it cannot be run, or what it made cannot be loaded
                said = str(error)
    raise InputError(f"fused=True needs a C compiler that works, and {' '.join(command)} said: {said}")
