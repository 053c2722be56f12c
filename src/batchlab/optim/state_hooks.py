"""Saving and loading for optimizers that wrap another: with the hooks that torch calls for one of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Optimizer = TypeVar("Optimizer")


def attributes_of_a_copy(optimizer: Any) -> dict[str, Any]:
    """All attributes but what belongs to the one that is copied: hooks, as torch has it, and a scheduler's `step`."""
    return {
        name: value for name, value in vars(optimizer).items() if name != "step" and not name.startswith("_optimizer_")
    }


def saves(save: Callable[[Optimizer], dict[str, Any]]) -> Callable[[Optimizer], dict[str, Any]]:
    """A `state_dict` between the hooks that were registered on the wrapper itself."""

    @wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = save(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            found = after(self, state)
            state = state if found is None else found
        return state

    return state_dict


def loads(load: Callable[[Optimizer, Any], None]) -> Callable[[Optimizer, Any], None]:
    """A `load_state_dict` between the hooks that were registered on the wrapper itself."""

    @wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            found = before(self, state_dict)
            state_dict = state_dict if found is None else found
        load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    return load_state_dict
