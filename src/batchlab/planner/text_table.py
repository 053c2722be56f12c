"""Rows of text as columns of equal width, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines under a head: the first column to the left, the others to the right.

    >>> print(text_table(["form", "error"], [["code", "0.055"], ["linear", "0.02"]]))
    form    error
    code    0.055
    linear   0.02
    """
    lines = [list(map(str, line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
