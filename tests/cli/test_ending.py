"""Signals and terminals: exit codes 130 and 143 wherever they come, and progress only where someone looks."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from batchlab.core.checkpoint import newest_whole
from batchlab.core.run import Run
from tests.cli.command import USER_JOB, batchlab, environment
from tests.spine.facts_fixture import hand_facts

# Half a minute, in short sleeps: a signal that comes on the way into a sleep is seen only when that sleep is over.
DOZE = """
import time

def doze():
    for _ in range(3000):
        time.sleep(0.01)
"""

SLOW_PARTS = f"""{DOZE}
from pathlib import Path

def announce(word):
    Path("reached").write_text(word)
    doze()
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "train.py").write_text(USER_JOB)
    facts = hand_facts(examples=256, base_learning_rate=0.05, job="line", micro_batches=(8, 16, 32, 64))
    (tmp_path / "facts.json").write_text(facts.to_json())
    return tmp_path


def start(line, cwd, **streams):
    """The command as a process that can be signalled."""
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "batchlab", *line.split()]
    return subprocess.Popen(command, cwd=cwd, env=environment(TERM="xterm"), **(settings | streams))


def wait_for(path, process):
    """Until a file is there; fails if the process ends first."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["import of the job", "data", "model", "loss"])
def test_a_signal_before_anything_is_saved_ends_at_once(number, phase, place):
    parts = {
        "import of the job": "announce(0 * 'x' or 'import')\n",
        "data": "class Slow(list):\n    def __len__(self):\n        announce('data')\njob = make(train=Slow([1]))\n",
        "model": "job = make(model=lambda: announce('model'))\n",
        "loss": "def wait(m, b):\n    announce('loss')\njob = make(loss=wait)\n",
    }
    (place / "slow.py").write_text(USER_JOB + SLOW_PARTS + parts[phase])
    process = start("tune slow.py:job --out runs/a", place)
    wait_for(place / "reached", process)
    begun = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=25)
    assert process.returncode == 128 + number, err
    assert time.monotonic() - begun < 20, "it waited for the sleep"
    assert out == "" and "Traceback" not in err
    assert not (place / "runs").exists()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_a_signal_while_python_and_torch_are_imported(delay, place):
    process = start("plan train.py:job --facts facts.json --out plan.json", place)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    if process.returncode == 0:  # it was done before the signal came
        assert (place / "plan.json").exists()
        return
    assert process.returncode in (143, -signal.SIGTERM), err  # the second: Python itself was not up yet
    assert not (place / "plan.json").exists()


SWALLOWER = """
import sys
from pathlib import Path
from batchlab.cli.ending import exit_code
def command():
    Path("reached").touch()
    for _ in range(3):
        try:
            doze()
        except BaseException:
            pass
    {more}
    Path("written").touch()
    return 0
sys.exit(exit_code(command))
"""


@pytest.mark.parametrize("more", ["doze()", "while True:\n        try: doze()\n        except: pass"])
def test_code_that_swallows_the_ending_is_ended_all_the_same(more, tmp_path):
    code = DOZE + SWALLOWER.format(more=more)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment())
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=25) == 143
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("error", ["ImportError('half imported')", "SystemExit(1)"])
def test_code_that_makes_an_error_of_the_ending_is_ended_all_the_same(error, tmp_path):
    code = f"""{DOZE}
import sys
from pathlib import Path
from batchlab.cli.ending import exit_code
def command():
    try:
        Path("reached").touch()
        doze()
    except BaseException:
        raise {error} from None
sys.exit(exit_code(command))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=25)
    assert (process.returncode, err) == (143, b"")


def test_cleaning_up_is_not_cut_short(tmp_path):
    code = f"""{DOZE}
import sys
from pathlib import Path
from batchlab.cli.ending import exit_code
def command():
    try:
        Path("reached").touch()
        doze()
    finally:
        for _ in range(20):
            time.sleep(0.02)
        Path("cleaned").touch()
sys.exit(exit_code(command))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment())
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=25) == 130
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_and_says_how_to_go_on(number, place):
    never = USER_JOB + "import time\ndef slow(m, b):\n    time.sleep(0.01)\n    return loss(m, b)\n"
    never += "job = bl.Job('line', lambda: nn.Linear(4, 1), slow, data(256, 0), data(64, 1))\n"
    (place / "slow.py").write_text(never)
    assert batchlab("plan train.py:job --facts facts.json --out plan.json", place).returncode == 0
    process = start("train slow.py:job --plan plan.json --out runs/a --max-steps 100000", place)
    wait_for(place / "runs/a/steps.jsonl", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    run = Run.open(place / "runs/a")
    assert run.summary["status"] in ("interrupted", "reached")
    assert list((run.path / "checkpoints").glob("step-*.safetensors"))


PHASES = """
import time
from pathlib import Path
import batchlab.spine.folder, batchlab.viz.page

def announce(number=[0]):
    number[0] += 1
    if number[0] == AT:
        Path("reached").touch()
        time.sleep(1.0)

def announced(function):
    def wrapper(*given, **named):
        announce()
        return function(*given, **named)
    return wrapper

def counted(module, batch):
    if WHERE == ("training" if module.training else "evaluation"):
        announce()
    return loss(module, batch)

if WHERE == "saving":
    batchlab.spine.folder.save_checkpoint = announced(batchlab.spine.folder.save_checkpoint)
if WHERE == "report":
    batchlab.viz.page.page = announced(batchlab.viz.page.page)
if WHERE == "compile":
    import torch._inductor.compile_fx as compiler
    compiler.compile_fx = announced(compiler.compile_fx)
job = make(loss=counted)
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "at", "command"),
    [
        ("training", 3, "train slow.py:job --plan plan.json"),
        ("training", 8, "train slow.py:job --plan plan.json"),
        ("evaluation", 4, "train slow.py:job --plan plan.json"),
        ("saving", 1, "train slow.py:job --plan plan.json"),
        ("compile", 1, "train slow.py:job --plan plan.json --compile"),
        ("report", 1, "tune slow.py:job --budget 3"),
    ],
)
def test_a_signal_in_any_phase_leaves_a_run_that_goes_on(number, where, at, command, place):
    assert batchlab("plan train.py:job --facts facts.json --batch-size 48 --out plan.json", place).returncode == 0
    split = json.loads((place / "plan.json").read_text()) | {"micro_batch": 16, "accumulation": 3}
    (place / "plan.json").write_text(json.dumps(split))
    (place / "slow.py").write_text(USER_JOB + f"WHERE, AT = {where!r}, {at}\n" + PHASES)
    process = start(f"{command} --out runs/a", place)
    wait_for(place / "reached", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    run, (state, problems) = Run.open(place / "runs/a"), newest_whole(place / "runs/a/checkpoints")
    assert state is not None and not problems
    assert state["learner"]["step"] == run.summary["steps"]
    if where == "report":
        assert run.summary["status"] in ("reached", "not reached")
        return
    assert run.summary["status"] == ("reached" if where == "saving" else "interrupted")
    assert batchlab("train train.py:job --out runs/a --resume", place).returncode == 0
    assert Run.open(place / "runs/a").summary["status"] == "reached"


def on_terminal(line, cwd, **changes):
    """The exit code, stdout, and what a terminal on stderr was sent."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchlab", *line.split()],
        cwd=cwd,
        env=environment(TERM="xterm-256color", **changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    seen = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 60)
        assert ready, "nothing more was said, and it did not end"
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux answers so when the last writer has gone
            break
        if not part:
            break
        seen += part
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, seen.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-9]|9[0-9]|38;[0-9;]+)m")


@pytest.fixture
def planned(place):
    assert batchlab("plan train.py:job --facts facts.json --out plan.json", place).returncode == 0
    return place


def test_progress_with_time_left_on_a_terminal(planned):
    code, out, seen = on_terminal("train train.py:job --plan plan.json --out runs/a --json", planned)
    assert code == 0
    assert out.count("\n") == 1 and "\x1b" not in out
    assert "train" in seen and re.search(r"\d+%", seen) and re.search(r"\d:\d\d:\d\d|-:--:--", seen)
    assert COLOUR.search(seen)


def test_no_colour_where_none_is_wanted(planned):
    code, _, seen = on_terminal("train train.py:job --plan plan.json --out runs/a", planned, NO_COLOR="1")
    assert code == 0 and "train" in seen and not COLOUR.search(seen)


def test_other_ranks_draw_nothing(planned):
    rank = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    code, out, seen = on_terminal("plan train.py:job --facts facts.json", planned, **rank)
    assert (code, out, seen.splitlines()) == (0, "", ["hello from the job"])


@pytest.mark.slow
def test_torchrun_speaks_once(planned):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["-m", "batchlab", "train", "train.py:job", "--plan", "plan.json", "--out", "runs/b", "--json"],
        cwd=planned,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert Run.open(planned / "runs/b").meta["world_size"] == 2
