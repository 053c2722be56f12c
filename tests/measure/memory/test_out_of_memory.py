"""Which errors say that memory ran out, and that nothing of a failed step outlives it."""

import gc
import weakref

import pytest
import torch

from batchlab.measure.memory.out_of_memory import free, is_out_of_memory, let_go


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any text"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (ValueError("CUDA out of memory"), False),
        (RuntimeError("index out of range"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
)
def test_what_counts(error, expected):
    assert is_out_of_memory(error) is expected


def test_errors_of_allocators_themselves_count():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as python:
        bytearray(2**62)
    assert is_out_of_memory(python.value)


def failed(kept):
    """An error with a cause, a context and a group of frames that hold tensors."""

    def inner():
        held = torch.empty(10)
        kept.append(weakref.ref(held))
        raise MemoryError("inner")

    def middle():
        held = torch.empty(10)
        kept.append(weakref.ref(held))
        try:
            inner()
        except MemoryError as error:
            raise ValueError("middle") from error

    try:
        try:
            middle()
        except ValueError:
            held = torch.empty(10)
            kept.append(weakref.ref(held))
            raise RuntimeError("CUDA out of memory.") from None
    except RuntimeError as error:
        return error


def test_frames_of_causes_and_contexts_are_let_go_and_the_text_stays():
    kept = []
    gc.disable()
    try:
        error = failed(kept)
        assert sum(reference() is not None for reference in kept) == 3
        let_go(error)
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()
    assert str(error) == "CUDA out of memory." and error.__traceback__ is None
    assert str(error.__context__) == "middle" and str(error.__context__.__cause__) == "inner"


def test_an_error_that_is_its_own_cause_ends():
    error = RuntimeError("out of memory")
    error.__cause__ = error
    let_go(error)


def test_freeing_collects_cycles():
    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself = cycle
    dead = weakref.ref(cycle)
    del cycle
    free(torch.device("cpu"))
    assert dead() is None
