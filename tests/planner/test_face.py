"""The names that the room hands on."""

import pkgutil
import subprocess
import sys

import pytest

from batchlab import planner


@pytest.mark.parametrize("name", planner.__all__)
def test_every_public_name_resolves(name):
    assert getattr(planner, name).__name__ == name
    assert name in dir(planner)


def test_no_public_name_is_that_of_a_module_which_would_take_its_place():
    assert not {module.name for module in pkgutil.iter_modules(planner.__path__)} & set(planner.__all__)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="'batchlab.planner' has no attribute 'recipy'"):
        planner.recipy  # noqa: B018


def test_the_room_loads_nothing_until_it_is_asked():
    loaded = "import sys, batchlab.planner; print([name for name in sys.modules if 'batchlab.planner.' in name])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"
