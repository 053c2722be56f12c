"""The reasons of a plan's numbers, gathered while the plan is made."""

from __future__ import annotations

from typing import Any

from batchlab.core.facts import Estimate
from batchlab.core.plan import Reason


class Reasons:
    """Keeps each number with its reason, and hands the number on."""

    def __init__(self) -> None:
        self.reasons: dict[str, Reason] = {}

    def keep(self, name: str, value: Any, rule: str, source: str, **inputs: Any) -> Any:
        """The number itself; `rule`, `source` and what was used are kept by its name."""
        plain = list(value) if isinstance(value, tuple) else value.value if isinstance(value, Estimate) else value
        self.reasons[name] = Reason(rule, source, inputs, plain)
        return value
