"""What the laws of `rules.loss` take and give: their constants, and losses in nats a token."""

from __future__ import annotations

from dataclasses import dataclass, fields

from batchlab.core.checks import check_positive
from batchlab.core.jsonio import JsonNoun


class _Positive(JsonNoun):
    """Every field finite and > 0, kept as a float."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        check_positive(**given)
        for name, value in given.items():
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class TrajectoryConstants(_Positive):
    """The six of L = (N_c/N)^α_N + (S_c/S_min)^α_S, S_min = S/(1 + B_*/(B·L^(1/α_B))).

    N_c: parameters. S_c: updates. B_star: tokens. The exponents have no unit.
    """

    alpha_N: float
    N_c: float
    alpha_S: float
    S_c: float
    alpha_B: float
    B_star: float


@dataclass(frozen=True)
class ChinchillaConstants(_Positive):
    """Of L = E + A/N^α + B/D^β. E: nats a token, what no model and no data remove."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float


@dataclass(frozen=True)
class LawLoss(JsonNoun):
    """What a law says of a loss. nats: a token, natural logarithm.

    law: its name in `rules.published`; "" for constants of your own. outside: which inputs lie beyond the range that
    the law was fitted over; "" if none does.
    """

    nats: float
    law: str = ""
    outside: str = ""

    def __float__(self) -> float:
        return self.nats


@dataclass(frozen=True)
class LossCurve(JsonNoun):
    """losses: nats a token after each of `steps` updates. law, outside: as in `LawLoss`."""

    steps: tuple[float, ...]
    losses: tuple[float, ...]
    law: str = ""
    outside: str = ""
