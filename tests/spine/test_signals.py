"""The first signal is a request, the second one ends; real signals, sent to this process or to a child."""

import os
import signal
import threading

import pytest

from batchlab.spine.signals import StopSignals
from tests.spine.forked import in_child

BOTH = (signal.SIGINT, signal.SIGTERM)


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.fixture(autouse=True)
def _handlers_come_back():
    """Ours stand while a test runs; whatever it leaves is put back."""
    before = [signal.signal(number, signal.default_int_handler) for number in BOTH]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_only_asks(number):
    before = handlers()
    with StopSignals() as signals:
        assert signals.requested == 0 and handlers() != before
        send(number)
        assert signals.requested == number
    assert handlers() == before


def twice(signals, first, second):
    """Sends both; the handlers that stand when the second one ends the process."""
    with signals:
        send(first)
        try:
            send(second)
        finally:
            signals.found = handlers()


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in BOTH for b in BOTH])
def test_the_second_signal_ends_at_once(first, second):
    """In the manner of its own number, with the handlers put back before anything is unwound."""
    before, signals = handlers(), StopSignals()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        twice(signals, first, second)
    assert signals.requested == first and signals.found == before
    if second == signal.SIGINT:
        assert caught.type is KeyboardInterrupt
    else:
        assert caught.value.code == 143


def test_a_process_ends_with_the_code_of_the_second_signal():
    assert in_child(twice, StopSignals(), signal.SIGINT, signal.SIGTERM) == 143


def _third():
    for number in BOTH:
        signal.signal(number, signal.SIG_DFL)
    try:
        twice(StopSignals(), signal.SIGINT, signal.SIGTERM)
    except SystemExit:
        send(signal.SIGTERM)  # nothing of ours holds it up


def test_a_third_signal_meets_the_users_own_handlers():
    assert in_child(_third) == -signal.SIGTERM


def test_a_handler_of_the_users_own_is_called_too():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append((number, frame is not None)))
    with StopSignals() as signals:
        send(signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
    assert seen == [(signal.SIGTERM, True)]


def test_a_handler_that_ends_at_once_is_not_called_for_a_request():
    def end(*_):
        raise AssertionError("it was called")

    end.ends_at_once = True
    signal.signal(signal.SIGTERM, end)
    with StopSignals() as signals:
        send(signal.SIGTERM)
    assert signals.requested == signal.SIGTERM
    with pytest.raises(AssertionError, match="it was called"):
        send(signal.SIGTERM)


def test_nested_uses_share_the_outermost():
    before = handlers()
    with StopSignals() as outer:
        ours = handlers()
        with StopSignals() as inner:
            send(signal.SIGINT)
        with StopSignals() as another:
            assert another is inner is outer and outer.requested == signal.SIGINT
        assert handlers() == ours
    assert handlers() == before
    with StopSignals() as fresh:
        assert fresh is not outer and fresh.requested == 0


def test_outside_the_main_thread_nothing_happens():
    before, seen = handlers(), []

    def elsewhere():
        with StopSignals() as signals:
            seen.append((handlers() == before, signals.requested))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(True, 0)] and handlers() == before


def test_an_error_inside_puts_the_handlers_back():
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert handlers() == before and StopSignals._active is None
