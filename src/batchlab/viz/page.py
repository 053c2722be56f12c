"""One self-contained HTML page from blocks. It opens with no network and asks for nothing.

Every text is escaped; figures travel as JSON data that is never run; a content-security policy allows the page's own
two scripts, by their digests, and nothing else. Inline styles are allowed because Plotly sets them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from functools import singledispatch
from importlib.resources import files
from typing import Any

from batchlab.core.errors import InputError
from batchlab.viz.blocks import (
    Actions,
    Block,
    Bullets,
    Chart,
    Choice,
    Paragraph,
    Row,
    Section,
    Table,
    Tiles,
    Verdict,
)
from batchlab.viz.style import DARK
from batchlab.viz.text import visible

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The whole page as text. title: also the document's. subtitle: a line below it."""
    from plotly.offline import get_plotlyjs

    _check_names(sections)
    library, script = _normal(get_plotlyjs()), _normal(_resource("page.js"))
    data = {"figures": _figures(sections), "dark": DARK}
    body = "\n".join(_section(section) for section in sections)
    links = "".join(f'<li><a href="#{section.name}">{esc(section.title)}</a></li>' for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy([library, script])}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{esc(title)}</title>\n<style>{_resource('page.css')}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f'<header><div><h1>{esc(title)}</h1><p class="quiet">{esc(subtitle)}</p></div>'
        '<button type="button" id="theme" hidden>Dark</button></header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        "<noscript><p>The pictures need JavaScript; all numbers are in the tables.</p></noscript>\n"
        f'<main id="main" tabindex="-1">\n{body}\n</main>\n'
        f'<script type="application/json" id="page-data">{data_text(data)}</script>\n'
        f"<script>{library}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def policy(scripts: Sequence[str]) -> str:
    """The content-security policy that lets exactly these inline scripts run.

    No default, no connection, no frame, no form; `data:` images are the empty icon.
    """
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def data_text(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>`, `&`, and nothing outside ASCII.

    >>> data_text({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: _ESCAPES[match[0]], text)


def esc(text: object) -> str:
    """Outside text as HTML text or attribute value."""
    return html.escape(visible(text), quote=True)


@singledispatch
def render(block: Block) -> str:
    """A block as HTML."""
    raise TypeError(f"not a block of a page: {type(block).__name__}")


@render.register
def _(block: Paragraph) -> str:
    return f'<p class="quiet">{esc(block.text)}</p>' if block.quiet else f"<p>{esc(block.text)}</p>"


@render.register
def _(block: Bullets) -> str:
    return f"<ul>{''.join(f'<li>{esc(item)}</li>' for item in block.items)}</ul>"


@render.register
def _(block: Actions) -> str:
    items = "".join(
        f'<li><span class="name">{esc(name)}</span> <strong>{esc(value)}</strong> <span>{esc(remark)}</span></li>'
        for name, value, remark in block.items
    )
    return f'<ol class="actions">{items}</ol>'


@render.register
def _(block: Verdict) -> str:
    tone = block.tone if block.tone in ("good", "bad") else "open"
    return f'<p class="verdict {tone}">{esc(block.text)}</p>'


@render.register
def _(block: Tiles) -> str:
    items = "".join(
        f"<div><dt>{esc(name)}</dt><dd><strong>{esc(value)}</strong> <span>{esc(remark)}</span></dd></div>"
        for name, value, remark in block.items
    )
    return f'<dl class="tiles">{items}</dl>'


@render.register
def _(block: Table) -> str:
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in block.columns)
    rows = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>'
        for row in block.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{esc(block.caption)}">'
        f"<table><caption>{esc(block.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


@render.register
def _(block: Chart) -> str:
    return (
        f'<figure class="chart"><figcaption><h3>{esc(block.title)}</h3><p>{esc(block.text)}</p></figcaption>'
        f'<div class="plot" id="{block.name}" role="img" aria-label="{esc(block.title)}. {esc(block.text)}"></div>'
        f'<div class="below"><button type="button" class="reset" data-plot="{block.name}" hidden>Reset view'
        f'<span class="unseen">: {esc(block.title)}</span></button>'
        f'<details><summary>Numbers<span class="unseen">: {esc(block.title)}</span></summary>'
        f"{render(block.table)}</details></div></figure>"
    )


@render.register
def _(block: Choice) -> str:
    buttons = "".join(
        f'<button type="button" data-panel="panel-{chart.name}" aria-pressed="{str(place == 0).lower()}">'
        f"{esc(text)}</button>"
        for place, (text, chart) in enumerate(block.charts)
    )
    panels = "".join(f'<div class="panel" id="panel-{chart.name}">{render(chart)}</div>' for _, chart in block.charts)
    return (
        f'<div class="choice"><div class="buttons" role="group" aria-label="{esc(block.label)}" hidden>'
        f'<span aria-hidden="true">{esc(block.label)}</span>{buttons}</div>{panels}</div>'
    )


@render.register
def _(block: Row) -> str:
    return f'<div class="row">{"".join(render(chart) for chart in block.charts)}</div>'


def _section(section: Section) -> str:
    blocks = "\n".join(render(block) for block in section.blocks)
    heading = f"{section.name}-title"
    return (
        f'<section id="{section.name}" aria-labelledby="{heading}">\n<h2 id="{heading}">{esc(section.title)}</h2>\n'
        f"{blocks}\n</section>"
    )


def charts(sections: Sequence[Section]) -> list[Chart]:
    """All charts of a page, in order."""
    found: list[Chart] = []
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Chart):
            found.append(block)
        elif isinstance(block, Row):
            found.extend(block.charts)
        elif isinstance(block, Choice):
            found.extend(chart for _, chart in block.charts)
    return found


def _figures(sections: Sequence[Section]) -> dict[str, Any]:
    return {chart.name: json.loads(chart.figure.to_json(validate=False)) for chart in charts(sections)}


def _check_names(sections: Sequence[Section]) -> None:
    names = [section.name for section in sections] + [chart.name for chart in charts(sections)]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise InputError(f"names on a page must be unique and of letters, digits and hyphens, got {name!r}")


def _normal(script: str) -> str:
    """A script as the browser will hash it: its text may not end its element, and line ends are line feeds."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    if re.search(r"</script|<!--", script, re.IGNORECASE):
        raise ValueError("a script that holds </script or <!-- cannot stand in a page")
    return script


def _resource(name: str) -> str:
    return files("batchlab.viz").joinpath(name).read_text(encoding="utf-8")
