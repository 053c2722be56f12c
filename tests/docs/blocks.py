"""Fenced code blocks of Markdown pages, in order."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PYTHON_FOLDERS = ("docs/optimizers", "docs/schedules", "docs/batches")
_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=ticks)[ \t]*$", re.M | re.S)
_FILE_NAME = re.compile(r"# ([\w.-]+\.py)\n")


class Block(NamedTuple):
    """language: what follows the opening fence. line: of the fence, from 1."""

    language: str
    text: str
    line: int

    @property
    def file_name(self) -> str | None:
        """The file that a Python block says it is: its first line is a comment with nothing but the name."""
        match = _FILE_NAME.match(self.text)
        return match[1] if match else None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    text = page.read_text("utf-8")
    return [
        Block(match["language"].strip(), match["text"], text.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(text)
    ]


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    docs = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
    return [ROOT / "README.md", *sorted(docs)]


def groups() -> dict[str, list[Path]]:
    """Pages that share a working folder: each alone, but the verbs' pages together, in the order of their contents.

    Without the folders whose pages are Python alone.
    """
    verbs = ROOT / "docs/verbs"
    order = [verbs / f"{name}.md" for name in re.findall(r"^(\w+)$", (verbs / "index.md").read_text(), re.M)]
    others = {verbs, *(ROOT / folder for folder in PYTHON_FOLDERS)}
    alone = {str(page.relative_to(ROOT)): [page] for page in pages() if not others & {*page.parents}}
    return {name: found for name, found in alone.items() if any(map(_runs, found))} | {"docs/verbs": order}


def _runs(page: Path) -> bool:
    return any(block.language in ("python", "bash") for block in blocks(page))
