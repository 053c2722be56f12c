"""From a typed name to a job, and what a user is told where that fails."""

import subprocess
import sys

import pytest

from batchlab import workloads
from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.workloads.resolve import job_names, load_job

USER_FILE = """
from dataclasses import dataclass
from pathlib import Path
from torch import nn
from batchlab import Job
{extra}
DATA = [(float(i), 2.0 * i) for i in range(8)]

def squared_error(model, batch):
    x, y = batch
    return (model(x.float()[:, None]) - y[:, None]).square().mean()

job = Job("line", lambda: nn.Linear(1, 1), squared_error, train=DATA, valid=DATA)

def make(steps=3):
    return Job(f"made {{steps}}", lambda: nn.Linear(1, 1), squared_error, train=DATA, valid=DATA)

def needs(argument):
    return job

def wrong():
    return [job]

number = 7

def breaks():
    raise KeyError("the user's own")
"""


@pytest.fixture(autouse=True)
def _path_as_before(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def user_file(tmp_path):
    def write(extra="", name="train.py"):
        file = tmp_path / name
        file.write_text(USER_FILE.format(extra=extra))
        return file

    return write


@pytest.mark.parametrize("name", ["digits", "pystdlib", "diabetes"])
def test_bundled_jobs_load_by_name(name):
    assert load_job(name).name == name


def test_every_public_name_is_a_function_though_a_module_has_its_name():
    import batchlab.workloads.digits  # noqa: F401

    assert all(callable(getattr(workloads, name)) for name in workloads.__all__)
    bundled = ["digits", "pystdlib", "diabetes", "syntax", "autoencoder"]
    assert job_names() == [*bundled, "text:PATH", "images:PATH", "table:PATH", "FILE.py:NAME"]


def test_importing_the_jobs_loads_no_heavy_library():
    heavy = "sklearn duckdb PIL optuna plotly pandas rich scipy"
    code = f"import batchlab.workloads.resolve, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_options_reach_the_job_and_none_is_no_option(tmp_path):
    assert load_job("digits", optimizer="sgd", target=None).optimizer == "sgd"
    file = tmp_path / "odd:name.csv"
    file.write_text("a,price\n" + "".join(f"{i},{i}.5\n" for i in range(30)))
    assert load_job(f"table:{file}", target="price").name == "table:odd:name.csv"
    prose = tmp_path / "prose.txt"
    prose.write_text("prose " * 100)
    assert load_job(f"text:{prose}", context=8).units_per_example == 8


def test_a_users_job_and_a_function_that_returns_one(user_file):
    file = user_file()
    assert isinstance(load_job(f"{file}:job"), Job)
    assert load_job(f"{file}:make").name == "made 3"
    assert load_job(f"{file}:make", steps=5).name == "made 5"


def test_a_users_file_sees_its_siblings_its_folder_and_the_working_directory(user_file, tmp_path, monkeypatch):
    (tmp_path / "a_sibling_of_train.py").write_text("import another_sibling_of_train\nVALUE = 1")
    (tmp_path / "another_sibling_of_train.py").write_text("")
    (tmp_path / "a_late_sibling_of_train.py").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data.txt").write_text("here")
    monkeypatch.chdir(elsewhere)
    extra = """
from a_sibling_of_train import VALUE
assert Path("data.txt").read_text() == "here" and Path(__file__).name == "train.py" and __name__ != "__main__"
@dataclass
class Settings:
    value: "int" = VALUE
def late():
    import a_late_sibling_of_train
"""
    before = list(sys.path)
    job = load_job(f"../{user_file(extra).name}:job")
    assert sys.path == [*before, str(tmp_path.resolve())]  # last: it shadows nothing
    sys.modules[job.loss.__module__].late()


def test_each_load_runs_the_file_anew(user_file):
    file = user_file()
    assert load_job(f"{file}:job") is not load_job(f"{file}:job")


@pytest.mark.parametrize(
    "spec, options, message",
    [
        (
            "digit",
            {},
            "there is no job 'digit', did you mean 'digits'\\? There are digits, pystdlib, .*, FILE.py:NAME$",
        ),
        ("image:./pets", {}, "there is no job 'image:./pets', did you mean 'images:./pets'\\?"),
        ("quux", {}, "there is no job 'quux'. There are digits"),
        ("", {}, "there is no job ''. There are digits"),
        ("train.txt:job", {}, "there is no job 'train.txt:job'"),
        ("digits:8", {}, "the job 'digits' has its own data and takes no path, got '8'"),
        ("text", {}, "the job 'text' needs the path of its data, text:PATH"),
        ("images:", {}, "the job 'images' needs the path of its data, images:PATH"),
        ("digits", {"size": 3}, "the job 'digits' has no option 'size'; it takes optimizer, target"),
        ("text:none", {"colour": 3}, "the job 'text' has no option 'colour'; it takes context, width, "),
        ("none/train.py:job", {}, "none/train.py is not a file"),
    ],
)
def test_what_is_refused(spec, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_job(spec, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (":jbo", {}, "train.py has no 'jbo'; its jobs: job; its functions: squared_error, make, needs, wrong, breaks"),
        (":", {}, "train.py needs the name of a job in it, .*train.py:NAME; its jobs: job; its functions: "),
        ("", {}, "train.py needs the name of a job in it, .*train.py:NAME; its jobs: job; its functions: "),
        (":number", {}, "train.py:number must be a batchlab.Job or a function that returns one, got int"),
        (":wrong", {}, "train.py:wrong must return a batchlab.Job, got list"),
        (":needs", {}, "train.py:needs must need no arguments, but needs argument"),
        (":job", {"steps": 3}, "train.py:job is a Job and takes no options, got steps"),
        (":make", {"size": 3}, "train.py:make' has no option 'size'; it takes steps"),
        (":wrong", {"size": 3}, "train.py:wrong' has no option 'size'; it takes none"),
    ],
)
def test_what_is_refused_of_a_users_file(user_file, name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_job(f"{user_file()}{name}", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["sys.exit(0)", "sys.exit(3)", "sys.exit('done')", "raise SystemExit"])
def test_a_file_that_ends_the_process_is_refused(user_file, call):
    with pytest.raises(InputError, match=r"ends the process, by sys.exit\(.*__main__"):
        load_job(f"{user_file(f'import sys; {call}', name='ends.py')}:job")
    with pytest.raises(InputError, match=r"ends.py:ends ends the process, by sys.exit\(.*\), and returns no job"):
        load_job(f"{user_file(f'import sys{chr(10)}def ends(): {call}', name='ends.py')}:ends")


def test_a_users_own_failure_comes_through_unchanged(user_file):
    with pytest.raises(KeyError, match="the user's own"):
        load_job(f"{user_file()}:breaks")
    before = list(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load_job(f"{user_file('1 / 0', name='broken.py')}:job")
    assert not [name for name in sys.modules if name not in before and "broken" in name]
    with pytest.raises(SyntaxError, match="invalid syntax"):
        load_job(f"{user_file('1 +', name='unfinished.py')}:job")
