"""What batchlab promises never to do: heavy imports, pickles, shells, network, listening sockets."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts.lint_trust import main as lint
from scripts.lint_trust import offences

from tests.cli.command import USER_JOB, environment
from tests.spine.facts_fixture import hand_facts

ROOT = Path(__file__).parents[1]
HEAVY = ("sklearn", "scipy", "optuna", "plotly", "duckdb", "rich", "typer", "PIL", "transformers", "lightning")


def python(code, *arguments, cwd=None):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = f"import torch, sys; before = set(sys.modules); import batchlab\nprint(*({set(HEAVY)} & set(sys.modules)))"
    assert python(code).split() == []


def test_the_nouns_are_light():
    names = ["Job", "Target", "Facts", "Estimate", "Plan", "Reason", "Run", "Study", "BatchlabError"]
    code = f"import torch, sys, batchlab\nfor name in {names}: getattr(batchlab, name)\n"
    assert python(code + f"print(*({set(HEAVY)} & set(sys.modules)))").split() == []


def test_the_source_keeps_the_rules():
    assert lint([str(ROOT / "src")]) == 0


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import dumps",
        "import cloudpickle as cp",
        "import joblib",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import yaml\nyaml.load(text)",
        "subprocess.run(line, shell=True)",
        "import os\nos.system('ls')",
        "import urllib.request",
        "from http.server import HTTPServer",
        "import requests",
        "import socket\nsocket.create_server(('', 0))",
        "from socket import socket",
        "np.load(path, allow_pickle=True)",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('pickle')",
    ],
)
def test_the_lint_sees(line):
    assert list(offences(line)), line


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "np.load(path)",
        "import socket\nsocket.gethostname()",
        "subprocess.run(['git'])",
        "text = 'import pickle'",
        "import importlib\nimportlib.import_module(f'batchlab.{name}')",
    ],
)
def test_the_lint_lets_pass(line):
    assert list(offences(line)) == []


AUDITED = """
import sys
from pathlib import Path
seen = []
def audit(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        if not (event == "socket.connect" and isinstance(arguments[1], (str, bytes))):
            seen.append((event, arguments))
    if event == "pickle.find_class":
        seen.append((event, arguments))
sys.addaudithook(audit)

def listening():
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            own.add(str(descriptor.readlink()))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        states = [(line.split()[3], line.split()[9]) for line in lines]
        found += [inode for state, inode in states if state == "0A" and f"socket:[{inode}]" in own]
    return found

from batchlab.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0, line
    assert listening() == [], line
print(seen)
"""


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_no_verb_connects_listens_or_unpickles(tmp_path):
    (tmp_path / "train.py").write_text(USER_JOB)
    facts = hand_facts(examples=256, base_learning_rate=0.05, job="line", micro_batches=(8, 16, 32, 64))
    (tmp_path / "facts.json").write_text(facts.to_json())
    verbs = (
        "probe train.py:job --budget 2",
        "plan train.py:job --facts facts.json --out plan.json",
        "train train.py:job --plan plan.json --out runs/a",
        "sweep train.py:job --batch-sizes 32,64 --trials 2 --facts facts.json --out runs/sweep",
        "report runs/a",
        "runs runs",
        "tune train.py:job --budget 3 --out runs/b",
        "systems",
    )
    assert python(AUDITED, *verbs, cwd=tmp_path).splitlines()[-1] == "[]"


def test_the_audit_sees_a_socket():
    code = AUDITED.partition("from batchlab.cli import main")[0]
    code += "import socket\nserver = socket.create_server(('127.0.0.1', 0))\nprint(len(listening()), len(seen) > 0)"
    assert python(code).split() == ["1", "True"]
