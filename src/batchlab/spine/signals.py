"""SIGINT and SIGTERM as a request that a loop answers at its next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one ends the process at once.

    A handler of the user's own is called too, and all handlers are put back at the end. Outside the main thread,
    where Python takes no handlers, it does nothing. Nested uses share the outermost one.

    >>> with StopSignals() as signals:
    ...     signals.requested
    0
    """

    _active: StopSignals | None = None

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if StopSignals._active is not None:
            return StopSignals._active
        if threading.current_thread() is threading.main_thread():
            StopSignals._active = self
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if StopSignals._active is self:
            StopSignals._active = None
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if self.requested:
            self.__exit__()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.requested = number
        if before is None or before is signal.default_int_handler or getattr(before, "ends_at_once", False):
            return
        if callable(before):
            before(number, frame)
