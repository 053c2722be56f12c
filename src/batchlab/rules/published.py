"""The constants of published laws, from `laws.toml`, each with unit, source and the range that it was fitted over.

Inputs are plain counts: a law whose source counts millions divides by itself. Beyond its range a law extrapolates and
says so; a thousandfold beyond, what was given is taken for another unit, and refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun, from_plain

TOO_FAR = 1000.0


@dataclass(frozen=True)
class Law(JsonNoun):
    """One published law. range: (least, most) of each input that it was fitted over, in plain counts.

    system: the number of its sheet, as in `batchlab systems`. gives: what comes out. formula: with its units. status:
    how its constants are known. wrong_when: when not to use it.
    """

    name: str
    system: int
    gives: str
    formula: str
    source: str
    status: str
    wrong_when: str
    constants: Mapping[str, float]
    range: Mapping[str, tuple[float, float]]

    def __getitem__(self, constant: str) -> float:
        return self.constants[constant]

    def factor_outside(self, **inputs: float) -> float:
        """By which factor the furthest of the inputs lies outside the law's range; 1 where none does.

        >>> round(law("data_cbs").factor_outside(tokens=2.5e11), 6), law("data_cbs").factor_outside(tokens=2e9)
        (10.0, 1.0)
        """
        check_positive(**inputs)
        factors = [1.0]
        for name, value in inputs.items():
            low, high = self._fitted(name, value)
            factors += [low / value, value / high]
        return max(factors)

    def outside(self, **inputs: float) -> str:
        """Which inputs lie beyond the law's range, in words; "" where none does. Refuses what is 1000 times beyond.

        >>> law("data_cbs").outside(tokens=3e11)
        'tokens of 3e+11 lie beyond 1.7e+09 to 2.5e+10, which data_cbs was fitted over'
        >>> law("data_cbs").outside(tokens=1.7)
        Traceback (most recent call last):
        batchlab.core.errors.InputError: tokens must be a plain count for data_cbs, fitted over 1.7e+09 to 2.5e+10, \
got 1.7: are these thousands, millions, billions or sequences?
        """
        check_positive(**inputs)
        for name, value in inputs.items():
            low, high = self._fitted(name, value)
            if value * TOO_FAR < low or value > high * TOO_FAR:
                unit, ask = _COUNT if name.endswith(("tokens", "params")) else _OTHER
                raise InputError(
                    f"{name} must be {unit} for {self.name}, fitted over {low:.3g} to {high:.3g}, got {value:.6g}{ask}"
                )
        return self.extrapolates(**inputs)

    def extrapolates(self, **inputs: float) -> str:
        """As `outside`, refusing none: for a law that is moved from a run of one's own, where units cancel."""
        check_positive(**inputs)
        said = []
        for name, value in inputs.items():
            low, high = self._fitted(name, value)
            if not low <= value <= high:
                said.append(
                    f"{name} of {value:.3g} lie beyond {low:.3g} to {high:.3g}, which {self.name} was fitted over"
                )
        return "; ".join(said)

    def _fitted(self, name: str, value: float) -> tuple[float, float]:
        """The range of an input, "least_tokens" and "base_tokens" being tokens too; the value's own where none is."""
        return self.range.get(name.removeprefix("base_").removeprefix("least_"), (value, value))


_COUNT = ("a plain count", ": are these thousands, millions, billions or sequences?")
_OTHER = ("within a thousandfold", "")


@cache
def laws() -> Mapping[str, Law]:
    """All of them, by name, in the order of the file."""
    text = (files("batchlab") / "rules" / "laws.toml").read_text("utf-8")
    rows = [from_plain(Law, row, source="laws.toml") for row in tomllib.loads(text)["law"]]
    return {row.name: row for row in rows}


def law(name: str) -> Law:
    """The law of that name.

    >>> law("data_budget")["p"]
    0.264
    """
    if not isinstance(name, str) or name not in laws():
        raise InputError(f"law must be one of {', '.join(laws())}, got {name!r}")
    return laws()[name]
