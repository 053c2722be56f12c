"""What a ranking rests on and what it cannot know, in sentences; and batches that no run has."""

from __future__ import annotations

from collections.abc import Iterator

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Device
from batchlab.planner.layouts.memory import Costing
from batchlab.planner.layouts.shape import ModelShape

MOST_TOKENS = 10**13
MANY_TOKENS = 10**8
FLOAT32_BYTES = 4


def check_sequences(model: ModelShape, global_batch: int, sequence_length: int) -> None:
    """Raises `InputError` beyond the learned positions, and where an update has more tokens than any corpus."""
    if 0 < model.positions < sequence_length:
        raise InputError(
            f"sequence_length must be at most the {model.positions} learned positions of the model, got "
            f"{sequence_length}"
        )
    if global_batch * sequence_length > MOST_TOKENS:
        raise InputError(
            f"global_batch must be in sequences: {global_batch} of {sequence_length} tokens are "
            f"{global_batch * sequence_length:.2g} tokens an update, more than the {MOST_TOKENS:.0e} of any corpus"
        )


def notes(*, reserve: float, measured: int, failed: int, scale: float) -> Iterator[str]:
    """Of the memory set aside, and of how many layouts were measured. failed: of them, those out of memory."""
    yield f"Memory counts {reserve / 1e9:.2f} GB a device for what is not modelled."
    if measured:
        yield (
            f"Layouts with measured times: {measured}; predictions of the others are multiplied by {scale:.3g}, the "
            "median of measured over predicted."
        )
    else:
        yield "All times are predicted: measure the first few before you commit to one."
    if failed:
        yield f"Layouts left out because they ran out of memory when measured: {failed}."


def peak_notes(device: Device, costing: Costing) -> Iterator[str]:
    """Where the numbers are not in the format of the device's peak, which times are reckoned from."""
    if costing.precision.activation >= FLOAT32_BYTES:
        yield (
            f"Times and MFU are reckoned from {device.name}'s {device.peak_flops / 1e12:.4g} TFLOP/s in "
            f"{device.peak_format}; products in float32 reach a small part of it, so of these rows only the memory "
            "holds. Measure, or give an efficiency whose matmul is float32's share."
        )
    elif device.peak_format == "float16":
        yield (
            f"Times and MFU hold for float16, of the same bytes: {device.name} has no bfloat16 matrix units, and its "
            f"{device.peak_flops / 1e12:.4g} TFLOP/s are float16's."
        )


def size_notes(model: ModelShape, *, global_batch: int, sequence_length: int) -> Iterator[str]:
    """Where a batch is so large that it may be in tokens, and where sequences outgrow the model's context."""
    if (tokens := global_batch * sequence_length) > MANY_TOKENS:
        yield (
            f"An update takes {tokens:.3g} tokens, {global_batch:,} sequences of {sequence_length:,}: is the batch in "
            "tokens? It is to be in sequences."
        )
    if model.context is not None and sequence_length > model.context:
        yield f"Sequences of {sequence_length:,} tokens are beyond the {model.context:,} that the model was made for."
