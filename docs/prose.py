"""Plain-prose docstrings as reStructuredText, and the list of systems as a Markdown table.

A docstring here is sentences, lines `name: what it is`, names in single backticks, and examples with `>>>`. Symbols as
in |G|² or S_min mean themselves.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def laws_table(laws) -> str:
    """Published laws as a Markdown table: what each gives, its formula, constants, range, status and limits."""
    head = ["| law | what it gives | constants | known | wrong when |", "| --- " * 5 + "|"]
    return "\n".join([*head, *("| " + " | ".join(_bars(cell) for cell in _law_cells(law)) + " |" for law in laws)])


def _law_cells(law) -> tuple[str, ...]:
    constants = ", ".join(f"{name} = {value:g}" for name, value in law.constants.items())
    fitted = ", ".join(f"{name.replace('_', ' ')} {low:.2g} to {high:.2g}" for name, (low, high) in law.range.items())
    gives, constants = (
        f"{law.gives}: {law.formula} ({law.source})",
        f"{constants}; over {fitted}" if fitted else constants,
    )
    return f"`{law.name}`", gives, constants, law.status, law.wrong_when


def regret_table(folder: Path) -> str:
    """Median regrets of learning-rate rules from the committed benchmark: by optimizer and evaluation, and over all."""
    ways = {"as they are": "rule_regret.json", "averaged": "rule_regret_averages.json"}
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for way, name in ways.items():
        for row in json.loads((folder / name).read_text("utf-8"))["rows"]:
            if "rules" in row:
                found = {rule: cell["regret"] for rule, cell in row["rules"].items()}
                cells.setdefault((row["optimizer"], way), []).append(found)
    cells["all", "both"] = [cell for each in cells.values() for cell in each]
    rules = list(dict.fromkeys(rule for each in cells.values() for cell in each for rule in cell))
    rules = [rule for rule in rules if all(rule in cell for cell in cells["all", "both"])]
    head = ["| optimizer | weights | cells | " + " | ".join(rules) + " |", "| --- " * (len(rules) + 3) + "|"]
    rows = (
        [optimizer, way, str(len(each)), *(_cell(statistics.median(cell[rule] for cell in each)) for rule in rules)]
        for (optimizer, way), each in cells.items()
    )
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def rate_rules_table(rules) -> str:
    """Rules of the learning rate, {name: (formula, source, where it holds)}, as a Markdown table."""
    head = ["| rule | formula | source | holds |", "| --- " * 4 + "|"]
    rows = ((f"`{name}`", *cells) for name, cells in rules.items())
    return "\n".join([*head, *("| " + " | ".join(_bars(cell) for cell in row) + " |" for row in rows)])


def _bars(text: str) -> str:
    """Bars and stars that mean themselves."""
    return text.replace("|", "\\|").replace("*", "\\*")


def benchmark_tables(folder: Path) -> str:
    """Every committed benchmark result: its claim, the machine, and a row for each of its rows.

    Columns are what is one number, word or yes and no; a part with "ratio", "low" and "high" is shown as an interval.
    Rows that share less than half of their columns are in tables of their own.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        machine, rows = result["machine"], filter(None, map(_flat, result["rows"]))
        where = f"{machine['processor']}, {machine['cores']} cores, torch {result['versions']['torch']}"
        script = next((name for name in scripts(path.stem) if (folder.parent / name).is_file()), f"{path.stem}.py")
        what = "" if script == f"{path.stem}.py" else f" ({path.stem})"
        parts += [f"## `benchmarks/{script}`{what}", "", result["claim"], "", f"Measured on: {where}.", ""]
        for names, alike in _tables(rows):
            parts += ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- " * len(names) + "|"]
            parts += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in alike]
            parts.append("")
    return "\n".join(parts)


def _tables(rows: Iterable[Mapping[str, Any]]) -> list[tuple[list[str], list[Mapping[str, Any]]]]:
    """The rows by what columns they have: all the columns of each table, and its rows."""
    tables: list[tuple[list[str], list[Mapping[str, Any]]]] = []
    for row in rows:
        fits = (table for table in tables if 2 * len(row.keys() & set(table[0])) >= len(row.keys() | set(table[0])))
        table = next(fits, None)
        if table is None:
            tables.append(table := ([], []))
        table[0].extend(name for name in row if name not in table[0])
        table[1].append(row)
    return tables


def scripts(stem: str) -> Iterable[str]:
    """What may have written a result: a script of its name, or of the part of it before an underscore."""
    words = stem.split("_")
    return ("_".join(words[:count]) + ".py" for count in range(len(words), 0, -1))


def result_table(paths: Iterable[Path], columns: Mapping[str, str]) -> str:
    """Rows of committed results as a Markdown table, a column for each (name in the row, heading)."""
    rows = [_flat(row) for path in sorted(paths) for row in json.loads(path.read_text("utf-8"))["rows"]]
    head = ["| " + " | ".join(columns.values()) + " |", "| --- " * len(columns) + "|"]
    return "\n".join(head + ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows])


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's cells; a ratio and its ends as one."""
    if "ratio" in row and "low" in row:
        row = {name: value for name, value in row.items() if name not in ("low", "high")} | {"ratio": _interval(row)}
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and "low" in value:
            flat[name] = _interval(value)
        elif not isinstance(value, (list, Mapping)):
            flat[name] = value
    return flat


def _interval(value: Mapping[str, Any]) -> str:
    middle = value.get("ratio", value.get("value"))
    return f"{_cell(middle)} ({_cell(value['low'])} to {_cell(value['high'])})"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


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


def optimizer_tables(path: Path) -> str:
    """A table for each job and batch size of the optimizer benchmark, the least loss first."""
    if not path.is_file():
        return ""
    parts, cells = [], {}
    for row in json.loads(path.read_text("utf-8"))["rows"]:
        cells.setdefault((row["job"], row["batch_size"], row["examples"]), []).append(row)
    for (job, batch, examples), rows in cells.items():
        parts.append(f"### {job}, batch {batch}, {examples:,} examples\n")
        parts.append("| optimizer | rate | loss, mean of seeds | spread | diverged | steps to target | state | ms |")
        parts.append("| --- " * 8 + "|")
        for row in sorted(rows, key=lambda each: _last(each["mean_loss"])):
            rate = f"{row['learning_rate' if 'learning_rate' in row else 'rate']:.3g}{' (edge)' if row['edge'] else ''}"
            lost = f"{row['diverged']} of {len(row['losses'])}, {row['trials_diverged']} of {row['trials']} trials"
            shown = (row["mean_loss"], row["spread"], lost, row["steps_to_target"], row["state"], row["step_ms"])
            parts.append("| " + " | ".join([row["optimizer"], rate, *map(_cell, shown)]) + " |")
        parts.append("")
    return "\n".join(parts)


def step_table(path: Path) -> str:
    """Times of optimizer steps as ratios to torch's fused AdamW, from the committed benchmark."""
    if not path.is_file():
        return ""
    rows = json.loads(path.read_text("utf-8"))["rows"]
    lists = list(dict.fromkeys(row["parameters"] for row in rows))
    found = {(row["optimizer"], row["parameters"]): row for row in rows}
    head = ["| step | " + " | ".join(lists) + " |", "| --- " * (len(lists) + 1) + "|"]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        ratios = (
            f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in (found[name, k] for k in lists)
        )
        head.append("| " + " | ".join([name, *ratios]) + " |")
    return "\n".join(head)


def _last(loss: float | str) -> float:
    return float(loss)
