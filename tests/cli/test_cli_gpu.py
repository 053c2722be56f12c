"""The command on a GPU, as users run it: tune digits to its report, and a run under torchrun."""

import json
import shlex
import subprocess
import sys

import pytest

from batchlab.core.facts import Facts
from batchlab.core.run import Run
from tests.cli.command import USER_JOB, environment
from tests.spine.jobs import toy_plan

pytestmark = pytest.mark.gpu
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m")


def _run(line, cwd, launcher=()):
    return subprocess.run(
        [sys.executable, "-m", *launcher, "batchlab", *shlex.split(line)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def place(tmp_path):
    (tmp_path / "train.py").write_text(USER_JOB)
    plan = toy_plan(job="line", steps=12)
    (tmp_path / "plan.json").write_text(plan.to_json())
    return tmp_path


def test_tune_digits_writes_its_report(accelerator, tmp_path):
    """With no device named it takes the GPU where there is one."""
    pytest.importorskip("plotly")
    given = "" if accelerator.type == "cuda" else "--device cpu"
    done = _run(f"tune digits --budget 12 --out runs/a --max-steps 60 --json {given}", tmp_path)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "runs/a")
    assert json.loads(done.stdout)["summary"] == run.summary
    assert run.meta["device"] == str(accelerator) == run.facts.device
    assert run.summary["final"]["loss"] < run.meta["initial"]["loss"]
    assert Facts.from_json((run.path / "facts.json").read_bytes()) == run.facts
    assert "<html" in (run.path / "report.html").read_text()
    if accelerator.type == "cuda":
        assert run.meta["machine"]["gpus"]


def test_torchrun_with_one_rank_is_the_run_without(accelerator, place):
    given = "train train.py:job --plan plan.json --max-steps 12 --json"
    done = _run(f"{given} --out runs/ranked", place, TORCHRUN)
    assert done.returncode == 0, done.stderr
    plain = _run(f"{given} --out runs/plain --device {accelerator}", place)
    assert plain.returncode == 0, plain.stderr
    ranked, alone = (Run.open(place / "runs" / name) for name in ("ranked", "plain"))
    assert ranked.meta["device"] == str(accelerator) and ranked.meta["world_size"] == 1
    for mine, theirs in zip(ranked.steps(), alone.steps(), strict=True):
        assert mine["loss"] == theirs["loss"] and mine["grad_norm"] == theirs["grad_norm"]
    assert ranked.summary["steps"] == alone.summary["steps"] > 0


def test_torchrun_on_the_cpu_of_a_machine_with_a_gpu(accelerator, place):
    done = _run("train train.py:job --plan plan.json --max-steps 5 --device cpu --out runs/cpu", place, TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert Run.open(place / "runs/cpu").meta["device"] == "cpu"
