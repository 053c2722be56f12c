"""`batchlab fit`: options of a law, what is read, and what it says of itself."""

import shlex

import pytest

from batchlab.cli import arguments, main
from batchlab.rules.fit import Fit


def test_options_of_a_law_are_integers_numbers_lists_or_texts():
    given = ["draws=20", "seed=0", "delta=1e-3", "target_losses=3.2,3.4", "by=params", "x=a,b"]
    values = arguments.named_values(given)
    assert values == {
        "draws": 20,
        "seed": 0,
        "delta": 1e-3,
        "target_losses": (3.2, 3.4),
        "by": "params",
        "x": "a,b",
    }
    assert type(values["draws"]) is int and type(values["delta"]) is float


def test_fit_takes_integer_options(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [(n, d, 2 + 400 / n**0.34 + 410 / d**0.28) for n in (1e8, 4e8, 16e8) for d in (1e9, 8e9, 64e9)]
    (tmp_path / "losses.csv").write_text("params,tokens,loss\n" + "\n".join(f"{n},{d},{loss}" for n, d, loss in rows))
    assert main(shlex.split("fit losses.csv --law chinchilla --set draws=3 --set seed=1 --json")) == 0
    assert Fit.from_json(capfd.readouterr().out).constants["E"].value == pytest.approx(2, abs=1e-3)
