"""The reasons of a plan's numbers, gathered while the plan is made."""

from __future__ import annotations

import dataclasses
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

    def add(self, name: str, **inputs: Any) -> None:
        """More of what a number that is kept was made of; nothing where it is not kept."""
        if kept := self.reasons.get(name):
            self.reasons[name] = dataclasses.replace(kept, inputs=dict(kept.inputs) | inputs)
