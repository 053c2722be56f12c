"""Every row of `systems.toml` names things that are there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from batchlab.core.systems import systems

ROOT = Path(__file__).parents[2]
ROWS = systems()


def test_the_rows_have_numbers_of_their_own_in_order():
    numbers = [row.number for row in ROWS]
    assert numbers == sorted(set(numbers)) and numbers


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_symbols_are_there_and_public(row):
    for symbol in row.symbols:
        module, _, name = symbol.rpartition(".")
        found = getattr(import_module(module), name)
        assert found.__doc__ and not name.startswith("_")
        assert found.__module__ == module, f"{symbol} is defined in {found.__module__}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_proofs_are_there(row):
    assert row.tests
    for proof in [*row.tests, *([row.benchmark] if row.benchmark else [])]:
        path, _, name = proof.partition("::")
        assert (ROOT / path).is_file(), proof
        assert not name or f"def {name}(" in (ROOT / path).read_text(), proof


def test_the_tests_are_there():
    """Files, and in them the functions that are named; to collect them all would take as long as to import them."""
    for test in {test for row in ROWS for test in row.tests}:
        file, *names = test.split("::")
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert any(name.startswith("test_") for name in defined), test
        assert {*names} <= defined, test
