"""Choices made from facts and rules: which batch, on how many devices, evaluated and saved how often.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.planner.advice.advise import advise as advise
    from batchlab.planner.advice.nouns import Advice as Advice
    from batchlab.planner.frontier_rows import frontier as frontier
    from batchlab.planner.recipes.recipe import Recipe as Recipe
    from batchlab.planner.recipes.recipe import read_recipe as read_recipe
    from batchlab.planner.recipes.rescale import Rescaled as Rescaled
    from batchlab.planner.recipes.rescale import recipe as recipe
    from batchlab.planner.recipes.rescale import rescaled_toml as rescaled_toml

_HOME = {
    "Advice": "advice.nouns",
    "advise": "advice.advise",
    "frontier": "frontier_rows",
    "Recipe": "recipes.recipe",
    "Rescaled": "recipes.rescale",
    "read_recipe": "recipes.recipe",
    "recipe": "recipes.rescale",
    "rescaled_toml": "recipes.rescale",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'batchlab.planner' has no attribute {name!r}")
    value = getattr(import_module(f"batchlab.planner.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
