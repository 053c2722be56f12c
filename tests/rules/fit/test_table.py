"""The table of runs and its readers: units in the names, one refusal a mistake, studies and run folders."""

import math
import re

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.core.study import Study
from batchlab.rules.fit import RunTable, from_study, read_runs
from tests.core.test_study import study_folder, trial
from tests.spine.run_folders import plan, reached_run, write_run

GOOD = {"params": [1e8, 2e8], "tokens": [1e9, 2e9], "batch_tokens": [1e5, 2e5], "loss": [3.0, 2.9]}


def test_sequences_times_their_length_are_tokens_and_steps_follow():
    table = RunTable.of(
        {"batch_sequences": [256, 512], "sequence_length": ["512", " 512 "], "steps": [100, 100], "loss": [3.1, 3.0]}
    )
    assert table["batch_tokens"].tolist() == [131072, 262144]
    assert table["tokens"].tolist() == [13107200, 26214400]
    assert table.batch() == ("batch_tokens", pytest.approx([131072, 262144]))
    assert RunTable.of(GOOD)["steps"].tolist() == [1e4, 1e4]


def test_millions_and_billions_by_name():
    table = RunTable.of({"params_millions": [85], "tokens_billions": [1.7], "batch_tokens_thousands": [131.072]})
    assert table["params"][0] == 85e6 and table["tokens"][0] == pytest.approx(1.7e9, rel=1e-12)
    assert table["batch_tokens"][0] == pytest.approx(131072)


def test_numpy_and_pandas_columns_are_plain_floats():
    pandas = pytest.importorskip("pandas")
    table = RunTable.of(pandas.DataFrame({name: np.array(values) for name, values in GOOD.items()}))
    assert table == RunTable.of(GOOD)
    assert RunTable.from_json(table.to_json()) == table


def test_blank_replicas_are_data_parallel_and_blank_steps_not_reached():
    table = RunTable.of({"replicas": ["", "4"], "steps_to_target": ["100", ""], "batch_examples": [8, 16]})
    assert table["replicas"].tolist() == [0, 4] and table["steps_to_target"].tolist() == [100, math.inf]
    assert table.batch()[0] == "batch_examples"
    assert RunTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"batch_size": [1]}, "the column 'batch_size' does not say what it counts: name it batch_tokens, batch_exam"),
        ({"Batch Size": [1]}, "'Batch Size' does not say what it counts: name it batch_tokens"),
        ({"lr": [1]}, "the column 'lr' does not say what it counts: name it learning_rate"),
        ({"N": [1]}, "the column 'N' does not say what it counts: name it params or params_millions"),
        ({"D": [1]}, "name it tokens or tokens_billions"),
        ({"Loss": [1]}, "the column 'Loss' does not say what it counts: name it loss"),
        (
            {"weight_decy": [1]},
            "the column 'weight_decy' is not known: name it weight_decay if it is that, or leave it",
        ),
        ({"batch_sequences": [1]}, "batch_sequences needs sequence_length, the tokens of each"),
        ({"params": [1e8], "params_millions": [100]}, "params_millions and params are one column twice: keep one"),
        ({"params": [1e8], "loss": []}, "columns must be of one length, got"),
        ({}, "a table of runs must hold at least one row, got none"),
        ([1, 2], "columns must be a mapping of names to values, got .1, 2."),
        ({"params": 1e8}, "params must be a sequence of numbers, got 100000000.0"),
        ({"note": ["a"]}, "a table of runs must hold a column that a law uses: params, tokens"),
        ({"params": ["100M"]}, "params must be a number, got '100M' in row 1"),
        ({"params": [""]}, "params must be a number, got '' in row 1"),
        ({"params": [1e8, -1]}, "params must be finite and > 0, got -1 in row 2"),
        ({"params": [math.nan]}, "params must be finite and > 0, got nan in row 1"),
        ({"weight_decay": [-0.1]}, "weight_decay must be finite and >= 0, got -0.1 in row 1"),
        ({"replicas": [1.5]}, "replicas must be a whole number, or blank for data-parallel training, got 1.5 in row 1"),
        ({"learning_rate_at_edge": [2]}, "learning_rate_at_edge must be 0 or 1, got 2 in row 1"),
        ({"steps_to_target": [0]}, "steps_to_target must be > 0, or blank where the target was not reached, got 0"),
        (
            GOOD | {"tokens": [1e9, 1e5]},
            "tokens must be those of the whole run, at least one batch of 200000, got 100000",
        ),
        (
            GOOD | {"steps": [1e4, 5e3]},
            "tokens must be steps x batch_tokens, got 2e.09 and 1e.09: is one in another unit",
        ),
        (
            {"batch_tokens": [1e5], "batch_sequences": [100], "sequence_length": [512]},
            "batch_tokens must be batch_sequences x sequence_length, got 100000 and 51200",
        ),
    ],
)
def test_each_mistake_is_named(columns, message):
    with pytest.raises(InputError, match=message):
        RunTable.of(columns)


def test_diverged_runs_are_refused_or_dropped_and_counted():
    columns = GOOD | {"loss": ["nan", "2.9"], "run": ["a", "b"]}
    with pytest.raises(
        InputError, match='loss must be finite, got nan in row 1: leave diverged runs out, or say diverged="d'
    ):
        RunTable.of(columns)
    table = RunTable.of(columns, diverged="drop")
    assert len(table) == 1 and table.texts["run"] == ("b",)
    assert table.notes == ("1 of 2 rows were left out: their loss is not finite",)
    with pytest.raises(InputError, match="loss must be finite in at least one row, got none"):
        RunTable.of(GOOD | {"loss": [math.inf, math.nan]}, diverged="drop")
    with pytest.raises(InputError, match="in row 3"):
        RunTable.of({"loss": [math.nan, 3.0, 2.0], "params": [1e8, 1e8, -5]}, diverged="drop")
    with pytest.raises(InputError, match='diverged must be "refuse" or "drop", got "?\'keep\''):
        RunTable.of(GOOD, diverged="keep")


def test_what_no_law_uses_is_left_out_and_said_and_small_counts_are_asked_about():
    table = RunTable.of({"params": [85, 150], "colour": ["red", "blue"], "loss": [3.0, 2.9]})
    assert table.notes == (
        "columns that no law uses were left out: colour",
        "params of at most 150: if these are no plain counts, name the column by its unit: params_thousands, "
        "params_millions, params_billions, params_trillions",
    )
    assert "colour" not in table and "params" in table


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"params": [70, 1200], "tokens": [2e9, 4e10]}, "3.1e.07 tokens a parameter: is one in another unit"),
        ({"params": [7e7, 1e9], "tokens": [1600, 32e3]}, "2.7e-05 tokens a parameter: is one in another unit"),
        ({"tokens": [2, 32]}, "tokens of at most 32: .*tokens_millions, tokens_billions, tokens_trillions"),
        ({"batch_tokens": [450, 4000]}, "batch_tokens of 450, less than .*: if these are sequences, .*batch_sequences"),
        ({"batch_tokens": [1024, 4096]}, None),
        ({"batch_sequences": [1, 4], "sequence_length": [64, 64]}, None),
        ({"params": [1e6, 1e9], "tokens": [1e10, 1e8]}, None),
    ],
)
def test_units_are_judged_together(columns, note):
    notes = RunTable.of(columns).notes
    assert len(notes) == (note is not None)
    assert note is None or re.match(note, notes[0])


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("params_b", "params_billions"),
        ("params_B", "params_billions"),
        ("Params (M)", "params_millions"),
        ("params_in_millions", "params_millions"),
        ("paramsb", "params_billions"),
        ("n_params_m", "params_millions"),
        ("N_b", "params_billions"),
        ("tokens_Billions", "tokens_billions"),
        ("tokens_bn", "tokens_billions"),
        ("D_T", "tokens_trillions"),
        ("token_b", "tokens_billions"),
        ("batch_tokens_k", "batch_tokens_thousands"),
        ("batch_tokens_M", "batch_tokens_millions"),
        ("steps_k", "steps, not in thousands,"),
    ],
)
def test_a_unit_in_short_is_asked_for_at_length(column, name):
    with pytest.raises(InputError, match=f"^the column {re.escape(repr(column))} is not known: name it {name} if it"):
        RunTable.of({column: [1, 2], "loss": [3, 3]})


@pytest.mark.parametrize("column", ["nb", "sm", "gpus_m", "loss_scaling", "mfu_t"])
def test_a_name_that_only_ends_in_a_scale_is_left_out_and_said(column):
    assert RunTable.of({column: [1], "loss": [3]}).notes == (f"columns that no law uses were left out: {column}",)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_may_be_parted_by_semicolons_or_tabs(tmp_path, mark):
    file = tmp_path / "runs.csv"
    file.write_text(f"\nparams{mark}loss\n1e8{mark}3.5\n2e8{mark}3.25\n")
    assert read_runs(file)["loss"].tolist() == [3.5, 3.25]


def test_a_decimal_comma_is_named(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("params;loss\n1e8;3,62\n")
    with pytest.raises(InputError, match="loss must be a number, got '3,62' in row 1: write it with a decimal point"):
        read_runs(file)
    file.write_text('params,loss\n"70,000,000",3.62\n')
    with pytest.raises(InputError, match="params must be a number, got '70,000,000' in row 1: write it with a decimal"):
        read_runs(file)


def test_rows_that_agree_are_grouped_in_order():
    table = RunTable.of({"params": [2e8, 1e8, 2e8 * (1 + 1e-12)], "tokens": [1e9, 2e9, 1e9], "loss": [3, 2, 1]})
    keys, rows = zip(*table.groups("params", "tokens"), strict=True)
    assert keys == ((1e8, 2e9), (2e8, 1e9)) and [each.tolist() for each in rows] == [[1], [0, 2]]
    assert table.take([2, 2])["loss"].tolist() == [1, 1]


def test_a_missing_column_is_asked_for():
    with pytest.raises(InputError, match="chinchilla needs the column tokens, got params, loss"):
        RunTable.of({"params": [1e8], "loss": [3.0]}).need("params", "tokens", law="chinchilla")
    with pytest.raises(InputError, match="surge needs a batch column, batch_tokens, batch_examples, or batch_seq"):
        RunTable.of({"params": [1e8]}).batch("surge")


def test_a_csv_is_read_with_its_units(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("\ufeffparams_millions, tokens ,batch_tokens,loss\n85,1.7e9,131072,3.42\n\n151,3e9,131072,3.24\n")
    table = read_runs(file)
    assert table["params"].tolist() == [85e6, 151e6] and table["loss"].tolist() == [3.42, 3.24]
    tabs = tmp_path / "runs.tsv"
    tabs.write_text(file.read_text("utf-8-sig").replace(",", "\t"))
    assert read_runs(str(tabs)) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,loss\n", "must hold a head of column names and at least one row, got 1 lines"),
        ("", "must hold a head of column names and at least one row, got 0 lines"),
        ("params,loss\n1e8\n", "row 1 has 1 cells, the head 2"),
        ("params,params\n1e8,1e8\n", "the column 'params' comes twice"),
        ("params,batch_size\n1e8,64\n", "runs.csv: the column 'batch_size' does not say what it counts"),
        ("params,loss\n1e8,inf\n", "runs.csv: loss must be finite, got inf in row 1"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, text, message):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_runs(file)


def test_what_is_no_file_or_folder_of_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="path must be a CSV file or a folder of runs, got '/no/such'"):
        read_runs("/no/such")
    with pytest.raises(InputError, match=r"must hold a study.json, or folders with a run.json, got neither"):
        read_runs(tmp_path)
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not a CSV file"):
        read_runs(tmp_path / "bad.csv")


def test_a_study_gives_its_tuned_rates_one_row_a_fresh_seed(tmp_path):
    trials = [
        trial(0, steps=100, rate=0.1),
        trial(1, steps=90, rate=0.2),
        trial(2, steps=95, rate=0.4),
        trial(0, steps=91, rate=0.2, kind="confirm", seed=1),
        trial(1, "not reached", 500, rate=0.2, kind="confirm", seed=2),
        trial(0, steps=40, rate=0.4, batch_size=64),
        trial(1, "diverged", 5, rate=0.8, batch_size=64),
        trial(0, "not reached", 500, batch_size=256),
    ]
    study = study_folder(tmp_path, trials)
    table = from_study(study)
    assert table["batch_examples"].tolist() == [16, 16, 64]
    assert table["steps_to_target"].tolist() == [91, math.inf, 40]
    assert table["learning_rate"].tolist() == [0.2, 0.2, 0.4]
    assert table["learning_rate_at_edge"].tolist() == [0, 0, 1]
    assert "batch size 64 has the steps of its search, which are too good on average" in table.notes
    assert "the best learning rate at batch size 64 lies at the edge of those tried" in table.notes
    assert "batch size 256 was left out: no run of it reached the target" in table.notes
    assert read_runs(tmp_path) == table


def test_an_empty_study_is_refused(tmp_path):
    study = study_folder(tmp_path, [trial(0, "diverged", 5)])
    assert isinstance(study, Study)
    with pytest.raises(InputError, match="must hold a batch size that reached its target, got none"):
        from_study(study)


def test_run_folders_give_a_row_each(tmp_path):
    for size in (32, 96):
        reached_run(tmp_path / f"b{size}", batch_size=size, micro_batch=32, accumulation=size // 32)
    write_run(tmp_path / "adaptive", [], plan=plan(batch_schedule="adaptive", max_batch_size=128))
    table = read_runs(tmp_path)
    assert table["batch_examples"].tolist() == [32, 96] and table.texts["run"] == ("b32", "b96")
    assert table["steps_to_target"].tolist() == [138, 138] and table["steps"].tolist() == [138, 138]
    assert table["loss"][0] == pytest.approx(2.2 * math.exp(-138 / 45) + 0.1)
    assert table["weight_decay"].tolist() == [0.01, 0.01]
    assert table.notes[0] == "adaptive was left out: its batch size is not fixed"
