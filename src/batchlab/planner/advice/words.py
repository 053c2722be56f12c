"""Advice as text for a terminal."""

from __future__ import annotations

import math

from batchlab.planner.advice.nouns import Advice, Answer, Setting
from batchlab.rules.published import laws


def table(advice: Advice) -> str:
    """A block for each question: the answers, the believed one marked with *, then why, and the warnings."""
    blocks = []
    for verdict in advice.verdicts:
        answers = [a for a in advice.answers if a.question == verdict.question]
        width = max(len(a.rule) for a in answers)
        lines = [f"{verdict.question}: {figure(verdict.value, verdict.unit, advice.setting)}"]
        for answer in answers:
            believed = answer.rule == verdict.rule and answer.value == verdict.value
            lines.append(f"  {'*' if believed else ' '} {answer.rule:<{width}}  {_line(answer, advice.setting)}")
        lines.append(f"    believed: {verdict.why}")
        lines += [f"    wrong when {laws()[verdict.rule].wrong_when}"] if verdict.rule in laws() else []
        lines += [f"    warning: {verdict.warning}"] if verdict.warning else []
        blocks.append("\n".join(lines))
    if advice.not_asked:
        rows = [f"    {each.rule} ({each.question}): {each.why}" for each in advice.not_asked]
        blocks.append("\n".join(["not asked:", *rows]))
    return "\n\n".join(blocks)


def figure(value: float, unit: str, setting: Setting) -> str:
    """A value with its unit; batches in sequences too.

    >>> figure(2097152.0, "tokens", Setting(7e9, 300e9))
    '2.1M tokens (1,024 sequences of 2048)'
    """
    if unit == "tokens":
        return f"{_short(value)} tokens ({value / setting.sequence_length:,.0f} sequences of {setting.sequence_length})"
    if unit == "updates":
        return f"{value:,.0f}"
    return f"{value:.3g} {unit}".rstrip()


def _line(answer: Answer, setting: Setting) -> str:
    known = next((word for word in ("unverified", "second-hand") if word in answer.status), "")
    outside = "" if not answer.outside else "does not quite hold" if math.isinf(answer.beyond) else "extrapolates"
    said = [figure(answer.value, answer.unit, setting), answer.note, outside, known, answer.source]
    return "; ".join(each for each in said if each)


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
