"""Plain-prose docstrings as reStructuredText, and the list of systems as a Markdown table.

A docstring here is sentences, lines `name: what it is`, names in single backticks, and examples with `>>>`. Symbols as
in |G|² or S_min mean themselves.
"""

import re
from collections.abc import Iterable, Sequence

_ITEM = re.compile(r"^([A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*|[\w ]{1,40}): (?=\S)")
_CODE = re.compile(r"(`[^`\n]+`)")


def process(app, what, name, value, options, lines: list[str]) -> None:
    """Rewrites a docstring's lines in place, as Sphinx's `autodoc-process-docstring` wants it."""
    lines[:] = to_rst(lines)


def to_rst(lines: Sequence[str]) -> list[str]:
    """The docstring's paragraphs; each `name: text` line becomes an item of a list, with the lines that go on from it.

    >>> to_rst(["Sums |x|.", "", "a, b: the `parts`,", "    in cm."])
    ['Sums \\\\|x\\\\|.', '', '* **a, b**: the ``parts``, in cm.', '']
    """
    result: list[str] = []
    for paragraph in _paragraphs(lines):
        if paragraph[0].lstrip().startswith(">>>"):
            result += [*paragraph, ""]
            continue
        for text in _joined(paragraph):
            item = _ITEM.match(text)
            if item:
                result += [f"* **{_escape(item[1])}**: {_inline(text[item.end() :])}", ""]
            else:
                result += [_inline(text), ""]
    return result


def systems_table(rows) -> str:
    """Rows of `systems.toml` as a Markdown table."""
    head = ["| No. | System | Paper | Names |", "| --- | --- | --- | --- |"]
    return "\n".join(
        head
        + [
            f"| {row.number:02d} | {row.name} | {row.paper}{f', arXiv {row.arxiv}' if row.arxiv else ''} "
            f"| {', '.join(f'`{symbol}`' for symbol in row.symbols)} |"
            for row in rows
        ]
    )


def _paragraphs(lines: Iterable[str]) -> Iterable[list[str]]:
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def _joined(paragraph: Sequence[str]) -> list[str]:
    """One text an item; lines that follow it belong to it. Without items, the whole paragraph."""
    texts: list[str] = []
    for line in paragraph:
        if not texts or (_ITEM.match(line) and not line.startswith(" ")):
            texts.append(line.strip())
        else:
            texts[-1] += " " + line.strip()
    return texts


def _inline(text: str) -> str:
    parts = _CODE.split(text)
    return "".join(f"`{part}`" if index % 2 else _escape(part) for index, part in enumerate(parts)).strip()


def _escape(text: str) -> str:
    return re.sub(r"([\\|*_`])", r"\\\1", text)
