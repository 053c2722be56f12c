"""Where a result came from: versions, machine, and the git commit of the user's code. No secrets, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import batchlab


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    import numpy

    return {
        "batchlab": batchlab.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def machine() -> dict[str, Any]:
    """What computed: processor, cores used by torch, memory in bytes, GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def git_commit(folder: Path | None = None) -> str | None:
    """The commit checked out where the user's script is, or here; "+changes" if files were edited; None outside git."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    where = folder or (Path(script).parent if script else Path.cwd())
    try:
        head = _git(where, "rev-parse", "HEAD")
        return f"{head}{'+changes' if _git(where, 'status', '--porcelain', '-uno') else ''}" if head else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
