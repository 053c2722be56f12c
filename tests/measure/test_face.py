"""The names that the room hands on."""

import pkgutil
import subprocess
import sys

import pytest

import batchlab.measure


@pytest.mark.parametrize("name", batchlab.measure.__all__)
def test_every_public_name_resolves(name):
    assert getattr(batchlab.measure, name).__name__ == name
    assert name in dir(batchlab.measure)


def test_no_public_name_is_that_of_a_module_which_would_take_its_place():
    modules = {module.name for module in pkgutil.iter_modules(batchlab.measure.__path__)}
    assert not modules & set(batchlab.measure.__all__)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="'batchlab.measure' has no attribute 'noise_scael'"):
        batchlab.measure.noise_scael  # noqa: B018


def test_the_room_loads_nothing_until_it_is_asked():
    loaded = "import sys, batchlab.measure; print([name for name in sys.modules if 'batchlab.measure.' in name])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"
