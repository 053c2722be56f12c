"""Which unit a column of runs is in: what its name lacks, and whether its values are plausible in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from batchlab.core.errors import InputError

SCALES = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
SCALED = ("params", "tokens", "batch_tokens")
BATCH = "batch_tokens, batch_examples, or batch_sequences with sequence_length"
_COUNTS = ("steps", "steps_to_target", "batch_sequences", "batch_examples", "sequence_length")
_NO_UNIT = {
    **dict.fromkeys(("batch", "batch_size", "bs", "b", "global_batch", "global_batch_size", "batchsize"), BATCH),
    **dict.fromkeys(("n", "n_params", "num_params", "parameters", "model_size", "size"), "params or params_millions"),
    **dict.fromkeys(("d", "n_tokens", "num_tokens", "train_tokens", "data"), "tokens or tokens_billions"),
    **dict.fromkeys(("lr", "eta", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("wd", "lambda"), "weight_decay"),
    **dict.fromkeys(("seq_len", "seqlen", "context", "context_length", "seq_length"), "sequence_length"),
    **dict.fromkeys(("val_loss", "valid_loss", "validation_loss", "eval_loss", "final_loss"), "loss"),
    **dict.fromkeys(("m", "n_replicas", "workers"), "replicas"),
    **dict.fromkeys(("s", "n_steps", "num_steps", "updates"), "steps or steps_to_target"),
}
_SHORT = {
    **dict.fromkeys(("k", "thousand", "thousands"), "thousands"),
    **dict.fromkeys(("m", "mn", "million", "millions"), "millions"),
    **dict.fromkeys(("b", "bn", "g", "billion", "billions"), "billions"),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), "trillions"),
}
_WITH_SCALE = re.compile(rf"(.+?)_?(?:in_)?({'|'.join(sorted(_SHORT, key=len, reverse=True))})")
_NEAR = 0.8
_SMALL = 1e3
_SEQUENCE = 1024  # tokens: the shortest context of the published laws' runs
_PER_PARAMETER = 1e-2, 1e5  # tokens: of published runs 0.1 to 1e4


def refuse_unclear(column: str, known: Iterable[str]) -> None:
    """`InputError` where the name of a column that no law uses is near to a known one, or has its unit in short.

    >>> refuse_unclear("Params (B)", ["params"])
    Traceback (most recent call last):
    batchlab.core.errors.InputError: the column 'Params (B)' is not known: name it params_billions if it is that, or \
leave it out
    """
    known = list(known)
    plain = re.sub(r"[^a-z0-9]+", "_", column.strip().lower()).strip("_")
    if plain in _NO_UNIT or plain in known:
        raise InputError(f"the column {column!r} does not say what it counts: name it {_NO_UNIT.get(plain, plain)}")
    near = _with_scale(plain) or next(iter(difflib.get_close_matches(plain, known, 1, _NEAR)), "")
    if near:
        raise InputError(f"the column {column!r} is not known: name it {near} if it is that, or leave it out")


def _with_scale(plain: str) -> str:
    """params_billions for params_b, n_bn or paramsb; "" where the name does not end in a scale."""
    found = _WITH_SCALE.fullmatch(plain)
    if found is None or (len(found[1]) == 1 and "_" not in plain):
        return ""
    stem, scale = found[1], _SHORT[found[2]]
    names = [each for each in (stem, f"{stem}s", _NO_UNIT.get(stem, "").split(" or ")[0]) if each]
    if scaled := [name for name in names if name in SCALED]:
        return f"{scaled[0]}_{scale}"
    counts = [name for name in names if name in _COUNTS]
    return f"{counts[0]}, not in {scale}," if counts else ""


def odd_units(numbers: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """What is implausible in the unit of its column, in sentences. numbers: params, tokens, batch_tokens, if known."""
    notes = []
    for name in ("params", "tokens"):
        if name in numbers and (most := numbers[name].max()) < _SMALL:
            units = ", ".join(f"{name}_{scale}" for scale in SCALES)
            notes.append(
                f"{name} of at most {most:g}: if these are no plain counts, name the column by its unit: {units}"
            )
    if not notes and "params" in numbers and "tokens" in numbers:
        ratio = float(np.exp(np.mean(np.log(numbers["tokens"] / numbers["params"]))))
        if not _PER_PARAMETER[0] <= ratio <= _PER_PARAMETER[1]:
            notes.append(
                f"{ratio:.2g} tokens a parameter: is one in another unit? Name the column by it, as params_millions or "
                "tokens_billions"
            )
    if "batch_tokens" in numbers and (least := numbers["batch_tokens"].min()) < _SEQUENCE:
        notes.append(
            f"batch_tokens of {least:g}, less than one sequence of {_SEQUENCE}: if these are sequences, name the "
            "column batch_sequences and give sequence_length; if thousands or millions, batch_tokens_thousands or "
            "batch_tokens_millions"
        )
    return notes
