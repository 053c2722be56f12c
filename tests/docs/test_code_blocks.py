"""Every code block of the README and the documentation runs, in a folder of its own, page by page from the top.

`python` blocks with no `bash` block between them share one namespace; one that begins with `# name.py` is also
written to that file. `bash` blocks run with `bash -e`. The command `batchlab` on their path is that of
`tests/warm.py`, with `--budget 3` for `tune` and `probe` whatever the block says, so that the pages run in two minutes;
`make` runs in the repository with that command and no installation. Blocks that no test can run are marked `text`.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests import warm
from tests.cli.command import environment
from tests.docs.blocks import PYTHON_FOLDERS, ROOT, Block, blocks, groups, pages

BUDGET = 3
KNOWN = {"python", "bash", "text", "json", "toml"}
SHIM = """#!/bin/bash
case "$1 $*" in
  *--help*) ;;
  "tune "*|"probe "*) set -- "$@" --budget {budget} ;;
esac
exec "{batchlab}" "$@"
"""
MAKE = """#!/bin/bash
exec "{make}" -C "{root}" VENV="{venv}" TUNE="--out $PWD/runs/made" "$@"
"""


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        known = block.language in KNOWN or block.language.startswith("{")
        assert known, f"{page.name}:{block.line}: {block.language!r} is none of {sorted(KNOWN)}"


@pytest.mark.parametrize("name", groups())
def test_code_blocks_run(name, tmp_path, monkeypatch):
    path = f"{tools(tmp_path / 'tools')}{os.pathsep}{os.environ['PATH']}"
    place = tmp_path / "place"
    place.mkdir()
    for page in groups()[name]:
        pending = ""
        for block in [*blocks(page), Block("bash", "", 0)]:
            where = f"{page.name}:{block.line}"
            if block.language == "python":
                pending += f"# {where}\n{block.text}\n"
                if block.file_name:
                    (place / block.file_name).write_text(block.text)
            elif block.language == "bash":
                if pending:
                    run([sys.executable, "-c", pending], place, path, f"{page.name} before line {block.line}")
                    pending = ""
                run(["bash", "-euo", "pipefail", "-c", block.text], place, path, where)


@pytest.mark.parametrize("folder", PYTHON_FOLDERS)
def test_pages_of_python_alone_run_in_one_process(folder, tmp_path):
    """Each in a namespace and a folder of its own; a process for each would import torch as often."""
    script = ["import os"]
    for page in sorted((ROOT / folder).glob("*.md")):
        place = tmp_path / page.stem
        place.mkdir()
        text = "\n".join(block.text for block in blocks(page) if block.language == "python")
        script.append(
            f"os.chdir({str(place)!r})\nexec(compile({text!r}, {page.name!r}, 'exec'), {{'__name__': '__main__'}})"
        )
    run([sys.executable, "-c", "\n".join(script)], tmp_path, os.environ["PATH"], folder)


def run(command, place, path, where):
    """Runs a block's command; a failure shows what it said."""
    variables = environment(PATH=path)
    variables["PYTHONPATH"] = f"{place}{os.pathsep}{variables['PYTHONPATH']}"
    done = subprocess.run(
        command, cwd=place, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{where} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def tools(folder):
    """A folder with the commands that blocks may call."""
    (folder / "bin").mkdir(parents=True)
    shim = SHIM.format(budget=BUDGET, batchlab=warm.command())
    make = MAKE.format(make=shutil.which("make"), root=ROOT, venv=folder)
    for name, text in (("batchlab", shim), ("make", make)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin/python").symlink_to(sys.executable)
    for stamp in ("installed", "installed-dev"):
        (folder / stamp).touch()
    return folder / "bin"
