"""C code that comes with batchlab, compiled for this machine when something first asks for it: a second."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from batchlab.core.errors import InputError

REAL = {torch.float32: ("float", "sqrtf", ctypes.c_float), torch.float64: ("double", "sqrt", ctypes.c_double)}
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
# With OpenMP, else in one thread; for this processor, which not all compilers call by the same name.
WAYS = (("-fopenmp", "-march=native"), ("-fopenmp", "-mcpu=native"), ("-march=native",), ("-mcpu=native",), ())


@cache
def compiler() -> str | None:
    """The C compiler: CC of the environment, else cc, gcc or clang; None where there is none."""
    given = os.environ.get("CC", "")
    return next(filter(None, map(shutil.which, [given, "cc", "gcc", "clang"])), None)


@cache
def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """A file of C for REAL float32 or float64, SQRT its square root; compiled once in a process, into a folder of its
    own that is removed again. Raises `InputError` with what the compiler said where it fails.
    """
    command, (real, root, _) = compiler(), REAL[dtype]
    with tempfile.TemporaryDirectory() as folder:
        out, said = os.path.join(folder, f"{source.stem}_{real}.so"), b""
        for way in WAYS:
            line = [str(command), *FLAGS, *way, f"-DREAL={real}", f"-DSQRT={root}", "-x", "c", "-", "-o", out, "-lm"]
            done = subprocess.run(line, input=source.read_bytes(), capture_output=True)
            if done.returncode == 0:
                return ctypes.CDLL(out)
            said = done.stderr
    raise InputError(f"fused=True needs a C compiler that works, and {command} said: {said.decode(errors='replace')}")
