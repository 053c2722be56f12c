"""The verbs that show what is there: runs, studies, and the list of systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import arguments
from batchlab.cli.app import app
from batchlab.cli.console import output, progress_bar
from batchlab.cli.options import Json


@app.command(epilog="Example: batchlab report runs/a --out a.html")
def report(
    run_or_study: Annotated[Path, typer.Argument(help="The folder of a run or a study.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The page.", metavar="FILE", show_default="report.html in the folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of a run or a study, which opens with no network, and show its first lines."""
    with output(as_json) as out_, progress_bar() as bar:
        arguments.check_file(out)
        what = arguments.opened(run_or_study)
        from batchlab.spine.report import report as verb
        from batchlab.spine.report import terminal_report

        with bar.waiting("write the report"):
            page = verb(what, out or run_or_study / "report.html")
        out_.result({"report": page}, terminal_report(what), f"Report: {page}")


@app.command(epilog="Example: batchlab runs runs --sql 'SELECT run, min(loss) FROM steps GROUP BY run ORDER BY 2'")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Searched for run folders.", show_default=False)],
    sql: Annotated[
        str | None, typer.Option(help="A question to the tables runs and steps.", metavar="QUERY", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the runs under a folder: DuckDB over their own files, which it only reads."""
    with output(as_json) as out_, progress_bar() as bar:
        from batchlab.cli.tables import rows_table
        from batchlab.core.query import OVERVIEW, query

        with bar.waiting("read the runs"):
            rows = query(folder, sql or OVERVIEW)
        out_.result({"rows": rows}, rows_table(rows))


@app.command(epilog="Example: batchlab systems --json")
def systems(as_json: Json = False) -> None:
    """List the published systems that batchlab implements, each with its paper and the tests that prove it."""
    with output(as_json) as out_:
        from batchlab.cli.tables import systems_table
        from batchlab.core.systems import systems as listed

        rows = listed()
        out_.result({"systems": rows}, systems_table(rows))
