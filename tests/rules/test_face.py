"""The names that the room hands on, and what is loaded for them."""

import subprocess
import sys
from types import ModuleType

import pytest

from batchlab import rules


@pytest.mark.parametrize("name", rules.__all__)
def test_every_public_name_resolves(name):
    found = getattr(rules, name)
    assert (found.__name__.rpartition(".")[2] if isinstance(found, ModuleType) else found.__name__) == name
    assert name in dir(rules)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="'batchlab.rules' has no attribute 'rulez'"):
        rules.rulez  # noqa: B018


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import batchlab.rules", ("torch", "numpy", "scipy")),
        ("from batchlab.planner import advise; advise(params=7e9, tokens=3e11)", ("torch", "scipy")),
        ("from batchlab.planner import Recipe, recipe; recipe(Recipe(64, 6400, 'sgd', 0.1), 128)", ("torch", "scipy")),
        ("from batchlab.rules.fit import fit, RunTable", ("torch",)),
        ("from batchlab.planner import layout, cost_table; layout.__doc__, cost_table.__doc__", ("torch",)),
    ],
)
def test_what_answers_at_once_loads_nothing_heavy(code, unwanted):
    listed = f"{code}; import sys; print(sorted(set({unwanted}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True).stdout == "[]\n"
