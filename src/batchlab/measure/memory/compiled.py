"""What `torch.compile` does beneath a measurement: when it compiled, and that it does not give up."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

SIZES = 1000


def compiled_graphs() -> int:
    """The graphs that were compiled so far in this process; a step in which it changed took time and memory for it."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return 0 if counters is None else int(counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def every_size_compiled() -> Iterator[None]:
    """Inside, code that is compiled anew for each size is, however many there are.

    By default torch falls back to eager code after 8, with a warning only, and measures would mix the two. Nothing is
    done where no compiler was loaded before: loading it takes seconds.
    """
    config = sys.modules.get("torch._dynamo.config")
    if config is None:
        yield
        return
    with config.patch(recompile_limit=SIZES, accumulated_recompile_limit=SIZES):
        yield
