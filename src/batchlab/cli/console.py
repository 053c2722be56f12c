"""Where the command's words go: one result to stdout, everything else to stderr, progress only to a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from batchlab.cli.ending import other_rank

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PIPE_WIDTH = 160  # characters: no terminal says how wide it is, and a table must not be cut


class Output:
    """The one result of a verb: JSON, or tables and lines for reading. Silent on ranks above 0."""

    def __init__(self, stream: IO[str], as_json: bool) -> None:
        self._stream = stream
        self._as_json = as_json

    def result(self, plain: Any, *readable: Any) -> None:
        """Prints `plain` as one line of JSON with `--json`, else each of `readable` (text or a rich table)."""
        if other_rank():
            return
        if self._as_json:
            from batchlab.core.jsonio import dumps

            print(dumps(plain), file=self._stream, flush=True)
            return
        from rich.console import Console

        terminal = self._stream.isatty()
        console = Console(file=self._stream, width=None if terminal else PIPE_WIDTH, highlight=False, markup=False)
        for part in readable:
            if terminal and isinstance(part, str):
                part = "\n".join(folded(line, console.width) for line in part.split("\n"))
            console.print(part, soft_wrap=isinstance(part, str))
        self._stream.flush()


def folded(line: str, width: int) -> str:
    """A line in as many as it needs, those after the first under its last column that begins in the left two thirds.

    Columns are what two spaces or more divide.

    >>> print(folded("batch  8192  kept, in examples", 24))
    batch  8192  kept, in
                 examples
    """
    if len(line) <= width:
        return line
    begun = [match.end() for match in re.finditer(r"\s{2,}", line) if match.end() <= width * 2 // 3]
    indent = " " * (begun[-1] if begun else 2)
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
        replace_whitespace=False,
    )


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """Inside, whatever is printed, by a job's own code too, goes to stderr; only `Output.result` reaches stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            os.fdopen(kept, "w", encoding="utf-8", closefd=False) as stream,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield Output(stream, as_json)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class Bar:
    """A progress bar with the time left for each phase, on stderr; nothing where stderr is no terminal.

    Called as `bar(phase, fraction)`, with the share of the phase that is done, 0 to 1.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, fraction: float) -> None:
        if self._progress is None:
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=1.0)
        self._progress.update(self._tasks[phase], completed=fraction)

    @contextlib.contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Shows that something goes on whose end cannot be foretold."""
        if self._progress is None:
            yield
            return
        task = self._progress.add_task(phase, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)


@contextlib.contextmanager
def progress_bar() -> Iterator[Bar]:
    """A `Bar`, drawn while it is entered."""
    if other_rank() or not sys.stderr.isatty():
        yield Bar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=True) as progress:
        yield Bar(progress)
