"""How the command ends: signals and exceptions as exit codes, each with at most one line unless it is a defect."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

BAD_INPUT, FAILURE = 2, 1
TICK_SECONDS, UNWIND_SECONDS = 0.05, 5.0


class Ended(SystemExit):
    """A signal came while there was nothing to save; `finally` blocks still run."""


def exit_code(command: Callable[[], int]) -> int:
    """Runs `command` and answers whatever comes of it with an exit code and, where there is something to say, a line.

    0 to 2 as the command says; bad input 2; foreseen failures 1; anything unforeseen 1 with its traceback, and a line
    where it is the user's code that raised.
    A signal's 128 + number ends the process here and now: no thread and no exit handler can hold it up. It is the
    answer too where the code that was interrupted made an error of it, as an extension module half imported does.
    """
    try:
        with _signals_end_at_once() as seen:
            code = _answer(command, seen)
    except Ended as ended:
        _leave(int(str(ended.code)))
    return code


@contextlib.contextmanager
def _signals_end_at_once() -> Iterator[list[int]]:
    """Gives the signals that came. The first SIGINT or SIGTERM unwinds with `Ended`; a second leaves without unwinding.

    In the midst of an `import` the process leaves at once: an extension module that an exception ends half-way aborts.
    Code that swallows `Ended` (a bare `except`, a finalizer) does not get away with it: it is raised again until it
    unwinds, and where that takes more than `UNWIND_SECONDS` the process leaves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    seen: list[int] = []
    ticks = itertools.count()

    def end(number: int, frame: FrameType | None) -> None:
        if seen or _importing(frame):
            os._exit(128 + number)
        seen.append(number)
        signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
        raise Ended(128 + number)

    def insist(_: int, __: FrameType | None) -> None:
        if next(ticks) * TICK_SECONDS > UNWIND_SECONDS:
            os._exit(128 + seen[0])
        if not _unwinding(sys.exc_info()[1]):
            raise Ended(128 + seen[0])

    end.ends_at_once = True  # type: ignore[attr-defined]  # `StopSignals` does not pass a signal on to such a handler
    handlers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGALRM: insist}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if (frame.f_code.co_name, frame.f_code.co_filename) == ("_find_and_load", "<frozen importlib._bootstrap>"):
            return True
        frame = frame.f_back
    return False


def _unwinding(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Ended):
            return True
        error = error.__context__
    return False


def _answer(command: Callable[[], int], seen: list[int]) -> int:
    try:
        return command()
    except Ended:
        raise
    except KeyboardInterrupt:
        raise Ended(128 + signal.SIGINT) from None
    except (SystemExit, Exception) as error:
        if seen:
            raise Ended(128 + seen[0]) from None
        return _answer_error(error)


def _answer_error(error: SystemExit | Exception) -> int:
    from batchlab.core.errors import BatchlabError, InputError, Interrupted

    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return _fail(str(error.code), FAILURE)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILURE
    if isinstance(error, InputError):
        return _fail(str(error), BAD_INPUT)
    if isinstance(error, Interrupted):
        _fail(str(error), 0)
        raise Ended(128 + error.signum) from None
    if isinstance(error, BatchlabError):
        return _fail(str(error), FAILURE)
    return _answer_unforeseen(error)


def _answer_unforeseen(error: Exception) -> int:
    """The traceback; where it went through the user's own code, from there on, and a line that says where."""
    told = traceback.TracebackException.from_exception(error)
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        print("".join(told.format_exception_only()), end="", file=sys.stderr)
        return _fail(f"{type(error).__name__}: {error.msg}, in {_from_here(error.filename)}:{error.lineno}", FAILURE)
    own = [place for place, frame in enumerate(told.stack) if _is_users(frame.filename)]
    if own:
        del told.stack[: own[0]]
    print("".join(told.format()), end="", file=sys.stderr)
    if not own:
        return FAILURE
    last, said = told.stack[own[-1] - own[0]], "".join(told.format_exception_only()).strip()
    return _fail(f"{said}, from {_from_here(last.filename)}:{last.lineno}", FAILURE)


def _from_here(file: str) -> str:
    try:
        return os.path.relpath(file)
    except (OSError, ValueError):  # the working directory is gone, or on another drive
        return file


def _is_users(file: str) -> bool:
    paths = sysconfig.get_paths()
    ours = [str(Path(__file__).parents[1]), *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    return os.path.isfile(file) and not any(Path(file).is_relative_to(each) for each in ours)


def _fail(message: str, code: int) -> int:
    rank = other_rank()
    where = f" (rank {rank})" if rank else ""
    print(f"batchlab: error{where}: {one_line(message)}", file=sys.stderr)
    return code


def one_line(message: str) -> str:
    """A message on one line, with what would steer the terminal made visible.

    >>> one_line("no such\\nfile: \\x1b[31m")
    'no such file: \\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))


def other_rank() -> int:
    """This process's rank under torchrun; 0 outside it, and on the rank that speaks for all."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the process
            stream.flush()
    os._exit(code)
