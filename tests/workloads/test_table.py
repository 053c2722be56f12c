"""Tables of the user's own: types, missing cells, standardisation, the rule for the task, and what is refused."""

import gzip

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.data.fetch import fetch
from batchlab.workloads import table
from batchlab.workloads.columns import Column, read_columns
from batchlab.workloads.features import encode, standardise


def csv(tmp_path, header, rows, name="data.csv"):
    file = tmp_path / name
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def numbers(tmp_path, n=40, **cells):
    """Columns a (noise) and b = 2a, and one more for each keyword: a function of the row's number."""
    a = np.random.default_rng(0).normal(size=n)
    rows = [",".join([f"{a[i]:.6f}", f"{2 * a[i]:.6f}", *(str(cell(i)) for cell in cells.values())]) for i in range(n)]
    return csv(tmp_path, ",".join(["a", "b", *cells]), rows)


def everything(job, part):
    return fetch(part, list(range(len(part))), job.collate)


class Always(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs):
        return self.outputs.expand(len(inputs), -1)


def test_columns_keep_their_types_quotes_and_holes(tmp_path):
    rows = [
        '1,"Zürich, ""old""",0.5,true,2024-01-01',
        ",批次,NA,false,2024-01-02",
        '3,"two\nlines",nan,,',
        '4,,2e3,TRUE,"2024-01-04"',
    ]
    columns = {c.name: c for c in read_columns(csv(tmp_path, '"an ""id""",place,x,ok,day', rows))}
    assert {name: c.kind for name, c in columns.items()} == {
        'an "id"': "integer",
        "place": "text",
        "x": "real",
        "ok": "truth",
        "day": "time",
    }
    nan = float("nan")
    np.testing.assert_array_equal(columns['an "id"'].values, [1, nan, 3, 4])
    assert columns["place"].values.tolist() == ['Zürich, "old"', "批次", "two\nlines", ""]
    np.testing.assert_array_equal(columns["x"].values, [0.5, nan, nan, 2000])
    np.testing.assert_array_equal(columns["ok"].values, [1, 0, nan, 1])
    np.testing.assert_array_equal(columns["day"].values - 1704067200, [0, 86400, nan, 3 * 86400])
    assert columns["place"].missing.tolist() == [False, False, False, True]


@pytest.mark.parametrize("separator, name", [(";", "a.csv"), ("\t", "a.tsv"), ("|", "a.txt"), (",", "a.csv")])
def test_the_header_tells_the_separator(tmp_path, separator, name):
    file = csv(tmp_path, separator.join(["x", '"y,;|z"']), [separator.join(["1", "u"])] * 3, name)
    assert [(c.name, c.kind) for c in read_columns(file)] == [("x", "integer"), ("y,;|z", "text")]


def test_compressed_and_parquet_files_are_the_same_table(tmp_path):
    import duckdb

    file = numbers(tmp_path, colour=lambda i: ["red", "blue", ""][i % 3])
    with gzip.open(tmp_path / "data.csv.gz", "wb") as stream:
        stream.write(file.read_bytes())
    parquet = tmp_path / "data.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT * FROM read_csv('{file}')) TO '{parquet}'")
    for other in (tmp_path / "data.csv.gz", parquet):
        for ours, theirs in zip(read_columns(file), read_columns(other), strict=True):
            assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
            np.testing.assert_array_equal(ours.values, theirs.values)


@pytest.mark.parametrize("name", ["d[1].csv", "d*.csv", "d?.csv"])
def test_a_file_name_is_no_pattern(tmp_path, name):
    for decoy in ("d1.csv", "dx.csv"):
        csv(tmp_path, "x", ["999"], decoy)
    assert read_columns(csv(tmp_path, "x", ["5"], name))[0].values.tolist() == [5]


def test_a_late_text_makes_the_column_one(tmp_path):
    rows = [f"{i},1" for i in range(30_000)] + ["late,1"]
    assert [c.kind for c in read_columns(csv(tmp_path, "a,b", rows))] == ["text", "integer"]


def test_nothing_is_a_comment(tmp_path):
    assert len(read_columns(csv(tmp_path, "a,b", ["#1,2", "3,4"]))[0].values) == 2


def test_features_use_the_training_rows_only():
    values, train = np.array([1.0, 2.0, 3.0, np.nan, 1000.0]), np.array([0, 1, 2, 3])
    features = encode([Column("x", "real", values)], train, max_categories=8)
    assert features.names == ("x", "x is missing")
    scale = np.sqrt(2 / 3)
    np.testing.assert_allclose(features.matrix[:, 0], np.array([-1, 0, 1, 0, 998]) / scale, rtol=1e-6)
    assert features.matrix[:, 1].tolist() == [0, 0, 0, 1, 0]


def test_categories_beyond_the_bound_share_one():
    texts = np.array(["a"] * 4 + ["b"] * 3 + ["", "", "c", "d", "new"], dtype=object)
    train = np.arange(11)
    few = encode([Column("t", "text", texts)], train, max_categories=4)
    assert few.names == ("t: a", "t: b", "t: missing", "t: other")
    assert (few.matrix.sum(1) == 1).all() and few.matrix[11].tolist() == [0, 0, 0, 1]
    assert few.notes == ("rare texts share one category in: t",)
    all_ = encode([Column("t", "text", texts)], train, max_categories=5)
    assert all_.names == ("t: missing", "t: a", "t: b", "t: c", "t: d")
    assert all_.matrix[11].sum() == 0 and all_.notes == ()


def test_constant_columns_are_dropped_and_named():
    columns = [
        Column(n, "real", np.array(v)) for n, v in {"k": [0.1] * 4, "x": [1.0, 2, 3, 4], "n": [np.nan] * 4}.items()
    ]
    features = encode(
        [*columns, Column("t", "text", np.array(["u"] * 4, dtype=object))], np.arange(3), max_categories=4
    )
    assert features.names == ("x",)
    assert features.notes == ("constant columns were dropped: k, n, t",)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_standardising_takes_any_scale(scale):
    scaled, mean, deviation = standardise(np.array([1.0, 3.0, 5.0]) * scale, np.array([0, 1]))
    np.testing.assert_allclose(scaled, [-1, 1, 3], rtol=1e-12)
    assert (mean, deviation) == (pytest.approx(2 * scale, rel=1e-12), pytest.approx(scale, rel=1e-12))


def test_a_table_is_split_and_standardised(tmp_path):
    job = table(numbers(tmp_path, n=100, price=lambda i: 50 + 3.5 * i), "price")
    assert job.name == "table:data.csv" and (len(job.train), len(job.valid)) == (80, 20)
    for values in (job.train.inputs.double(), job.train.targets.double()[:, None]):
        assert values.mean(0).abs().max() < 1e-6 and (values.std(0, correction=0) - 1).abs().max() < 1e-6
    every = torch.cat([job.train.targets, job.valid.targets])
    assert len(torch.unique(every)) == 100
    measured = job.metric(Always(torch.zeros(1)), everything(job, job.valid))
    step = (every.max() - every.min()).double() / 99  # 3.5 in deviations
    errors = job.valid.targets.double() * 3.5 / step
    assert float(measured["mae"]) == pytest.approx(float(errors.abs().mean()), rel=1e-5)
    assert float(measured["mse"]) == pytest.approx(float(errors.square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    "cell, metrics",
    [
        (lambda i: ["no", "yes"][i % 2], {"accuracy"}),
        (lambda i: ["true", "false"][i % 2], {"accuracy"}),
        (lambda i: i % 10, {"accuracy"}),
        (lambda i: i % 11, {"mae", "mse"}),
        (lambda i: i % 2 + 0.5, {"mae", "mse"}),
    ],
)
def test_the_rule_for_the_task(tmp_path, cell, metrics):
    job = table(numbers(tmp_path, n=60, y=cell), "y")
    batch = everything(job, job.valid)
    assert set(job.metric(job.model(), batch)) == metrics
    assert job.loss(job.model(), batch).ndim == 0


def test_the_task_can_be_chosen(tmp_path):
    file = numbers(tmp_path, n=60, y=lambda i: i % 3)
    job = table(file, "y", task="regression", reach=Target("mae", 0.1))
    assert job.valid.targets.dtype == torch.float32 and job.target == Target("mae", 0.1)
    assert table(file, "y").valid.targets.tolist().count(0) == 4  # a third of 12


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    job = table(numbers(tmp_path, n=60, y=lambda i: "" if i % 4 == 0 else f"{i}.5"), "y")
    assert len(job.train) + len(job.valid) == 45
    assert job.train.notes == ("rows dropped, for they have no 'y': 15",)


def test_a_dropped_column_is_not_used(tmp_path):
    file = numbers(tmp_path, y=lambda i: i + 0.5)
    assert table(file, "y").train.inputs.shape[1] == 2
    assert table(file, "y", drop=["b"]).train.inputs.shape[1] == 1
    torch.testing.assert_close(table(file, "y", drop="b").train.inputs[:, 0], table(file, "y").train.inputs[:, 0])


def test_it_learns_a_line(tmp_path):
    job = table(numbers(tmp_path, n=200, g=lambda i: ["u", "v"][i % 2]), "b")
    torch.manual_seed(0)
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        job.loss(model, everything(job, job.train)).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(job.loss(model, everything(job, job.valid))) < 0.05  # 1 is the mean's


def constant(tmp_path):
    return csv(tmp_path, "a,y", ["1,2.5"] * 30)


REFUSED = {
    "no file": (lambda p: p / "none.csv", "y", {}, "none.csv does not exist"),
    "a folder": (lambda p: p, "y", {}, "is not a file"),
    "a document": (lambda p: csv(p, "a", ["1"], "a.docx"), "y", {}, "must be a table with one of the suffixes .csv, "),
    "empty": (lambda p: csv(p, "", []), "y", {}, "data.csv holds no rows"),
    "header only": (lambda p: csv(p, "a,y", []), "y", {}, "data.csv holds no rows"),
    "no target": (numbers, None, {}, "needs target, the column to predict; its columns are a, b"),
    "wrong target": (numbers, "price", {}, r"has no column 'price'\. Its columns are a, b"),
    "close target": (
        lambda p: numbers(p, price=lambda i: i),
        "prize",
        {},
        r"no column 'prize', did you mean 'price'\? Its columns are a, b, price",
    ),
    "wrong drop": (numbers, "a", {"drop": "c"}, "has no column 'c'"),
    "few rows": (lambda p: numbers(p, n=19), "b", {}, "has 19 rows with a 'b', but needs at least 20"),
    "short row": (lambda p: csv(p, "a,b", ["1,2", "3"]), "a", {}, "line 3 has 1 cells, the header has 2"),
    "long row": (lambda p: csv(p, "a,b", ["1,2", "3,4,5"]), "a", {}, "line 3 has 3 cells, the header has 2"),
    "infinity": (lambda p: csv(p, "a,b", ["1,2.5", "3,inf"]), "a", {}, "column 'b' is infinite in row 2"),
    "constant": (constant, "y", {}, "column 'y' is constant, there is nothing to predict"),
    "one class": (constant, "y", {"task": "classification"}, "column 'y' holds one class only, 2.5"),
    "no feature": (constant, "a", {"task": "regression"}, "column 'a' is constant"),
    "constant features": (
        lambda p: csv(p, "a,y", [f"1,{i}.5" for i in range(30)]),
        "y",
        {},
        "has no column to predict 'y' from that is not constant",
    ),
    "free text": (
        lambda p: csv(p, "a,y", [f"{i},t{i}" for i in range(30)]),
        "y",
        {},
        "column 'y' holds 30 different values in 30 rows, too many to be classes",
    ),
    "decimal comma": (
        lambda p: csv(p, "a;y", [f"{i};{i},5" for i in range(30)]),
        "y",
        {},
        "too many to be classes: numbers need a decimal point, these have a comma",
    ),
    "text regressed": (
        lambda p: csv(p, "a,y", [f"{i},{'uv'[i % 2]}" for i in range(30)]),
        "y",
        {"task": "regression"},
        "column 'y' holds texts, which cannot be regressed",
    ),
    "task": (numbers, "a", {"task": "ranking"}, 'task must be "classification" or "regression", got \'ranking\''),
    "share": (numbers, "a", {"valid_share": 0}, r"valid_share must lie in \(0, 1\), got 0"),
    "hidden": (numbers, "a", {"hidden": 1.5}, "hidden must be an integer of at least 1, got 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    make, target, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        table(make(tmp_path), target, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"a,b\n1,caf\xe9\n2,x\n", np.random.default_rng(1).bytes(3000)], ids=["latin", "noise"]
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.csv cannot be read as a table: ") as caught:
        table(tmp_path / "data.csv", "a")
    assert "\n" not in str(caught.value)


def test_a_column_of_lists_is_refused(tmp_path):
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT [1, 2] AS pair FROM range(30)) TO '{tmp_path / 'data.parquet'}'")
    with pytest.raises(
        InputError, match="column 'pair' is of type INTEGER\\[\\], which is neither a number nor a text"
    ):
        table(tmp_path / "data.parquet", "pair")
