"""What a report page is made of: plain values that hold text, tables and figures. `batchlab.viz.page` renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `quiet` for an aside, such as what is missing and how to get it."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Actions:
    """The few settings to use: (name, value, remark), shown large."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Verdict:
    """What came of it, in words. tone: "good", "bad" or "open"."""

    text: str
    tone: str = "open"


@dataclass(frozen=True)
class Tiles:
    """Numbers side by side: (name, value, remark)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table that scrolls inside its own box. caption: what it holds."""

    caption: str
    columns: Sequence[str]
    rows: Rows


@dataclass(frozen=True)
class Chart:
    """A figure with its title, a sentence that says what it shows, and the same numbers as a table.

    name: unique on the page, of letters, digits and hyphens. figure: a Plotly figure.
    """

    name: str
    title: str
    text: str
    figure: Any
    table: Table


@dataclass(frozen=True)
class Choice:
    """Charts of which one is shown at a time. label: what one chooses. charts: (button text, chart)."""

    label: str
    charts: Sequence[tuple[str, Chart]]


@dataclass(frozen=True)
class Row:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


Block = Paragraph | Bullets | Actions | Verdict | Tiles | Table | Chart | Choice | Row


@dataclass(frozen=True)
class Section:
    """A titled part of the page. name: unique on the page, of letters, digits and hyphens."""

    name: str
    title: str
    blocks: Sequence[Block]
