"""`batchlab fit`: options of a law, what is read, and what it says of itself."""

import re
import shlex

import pytest

from batchlab.cli import arguments, main
from batchlab.cli.app import command
from batchlab.rules.fit import Fit, fit_laws
from batchlab.rules.fit.table import NUMBERS, TEXTS

COMMANDS = command().commands


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


def test_help_names_the_laws_and_the_columns():
    params = {each.name: each.help for each in COMMANDS["fit"].params}
    assert params["law"] == f"One of {', '.join(fit_laws())}."
    assert all(name in re.findall(r"\w+", params["runs"]) for name in (*NUMBERS, *TEXTS))


def test_diverged_runs_are_dropped_when_asked(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = ["batch_tokens,loss", *(f"{2**k},{3 + (k - 18) ** 2 / 100}" for k in range(15, 22)), f"{2**22},nan"]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    assert main(shlex.split("fit runs.csv --law batch_optimum")) == 2
    assert "--drop-diverged" in capfd.readouterr().err
    assert main(shlex.split("fit runs.csv --law batch_optimum --drop-diverged --json")) == 0
    found = Fit.from_json(capfd.readouterr().out)
    assert found.warnings == ("1 of 8 rows were left out: their loss is not finite",)
    assert found.constants["batch_tokens_opt"].value == pytest.approx(2**18)


@pytest.mark.parametrize("name", ["law", "table"])
def test_what_is_no_option_is_refused(name, tmp_path, monkeypatch, capfd):
    (tmp_path / "runs.csv").write_text("tokens,loss\n1e9,3\n2e9,2.9\n")
    assert main(["fit", str(tmp_path / "runs.csv"), "--law", "power_law", "--set", f"{name}=x"]) == 2
    assert f"--set must name an option of the law, got '{name}'" in capfd.readouterr().err
