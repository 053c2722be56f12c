"""The verbs. Each reads its arguments, calls the Python verb of the same name, and shows what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from batchlab.cli import arguments
from batchlab.cli.console import output, progress_bar
from batchlab.cli.ending import BAD_INPUT, one_line, other_rank
from batchlab.cli.options import (
    AtLeast,
    AtMost,
    BatchSchedule,
    Column,
    Device,
    FileOut,
    Goal,
    GoalOption,
    JobSpec,
    Json,
    MaxSteps,
    Precision,
    RunOut,
    Seed,
)
from batchlab.core.errors import InputError

UsageError: type[Exception] = typer.BadParameter.__mro__[2]  # Typer does not name the base of its usage errors

app = typer.Typer(
    name="batchlab",
    help="Which batch size, and what else must change with it? Measured on your model, for PyTorch.",
    epilog="Begin with: batchlab tune digits",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(given: Sequence[str] | None = None) -> int:
    """Runs the verb that the arguments name; wrong usage is one line on stderr and 2."""
    import sys

    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=list(sys.argv[1:] if given is None else given), prog_name="batchlab", standalone_mode=False
        )
        return code if isinstance(code, int) else 0
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)  # type: ignore[attr-defined]
        elif not other_rank():
            typer.echo(f"batchlab: error: {one_line(error.format_message())}", err=True)  # type: ignore[attr-defined]
        return BAD_INPUT
    except typer.Abort:
        raise KeyboardInterrupt from None


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        import batchlab

        typer.echo(batchlab.__version__)
        raise typer.Exit


@app.command(epilog="Example: batchlab tune digits --goal balanced --out runs/first")
def tune(
    job: JobSpec,
    goal: GoalOption = Goal.BALANCED,
    out: RunOut = None,
    budget: Annotated[float, typer.Option(help="Seconds that it aims at in all.")] = 60.0,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Then sweep batch sizes and hold the plan to it.")] = False,
    device: Device = None,
    max_steps: MaxSteps = None,
    target: Column = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    as_json: Json = False,
) -> None:
    """Measure JOB, plan its run, train it, and write a report: the main road."""
    with output(as_json) as out_, progress_bar() as bar:
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.report import terminal_report
        from batchlab.spine.tune import REPORT_FILE, STUDY_FOLDER
        from batchlab.spine.tune import tune as verb

        with process_group():
            with bar.waiting("load the job"):
                what = arguments.load(job, target, arguments.learning_target(at_least, at_most))
            folder = arguments.run_folder(out, what)
            done = verb(
                what,
                goal=goal.value,
                out=folder,
                budget=budget,
                seed=seed,
                verify=verify,
                device=device,
                max_steps=max_steps,
                progress=bar,
            )
        page = folder / REPORT_FILE
        result: dict[str, Any] = {"run": folder, "report": page, "summary": done.summary, "plan": done.plan}
        shown = [terminal_report(done)]
        if verify:
            from batchlab.core.study import Study

            study = Study.open(folder / STUDY_FOLDER)
            result |= {"study": study.path, "study_summary": study.summary}
            shown.append(terminal_report(study))
        out_.result(result, *shown, f"Report: {page}")


@app.command(epilog="Example: batchlab probe digits --budget 20 --out facts.json")
def probe(
    job: JobSpec,
    budget: Annotated[float, typer.Option(help="Seconds that it aims at.")] = 20.0,
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    target: Column = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    as_json: Json = False,
) -> None:
    """Measure JOB on this machine: speed, memory, noise scale, a good learning rate. Its model is not touched."""
    with output(as_json) as out_, progress_bar() as bar:
        arguments.check_file(out)
        from batchlab.cli.tables import facts_table
        from batchlab.core.files import write_atomic
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.probe import probe as verb

        with process_group():
            with bar.waiting("load the job"):
                what = arguments.load(job, target, arguments.learning_target(at_least, at_most))
            facts = verb(what, budget=budget, seed=seed, device=device, progress=bar)
        if out is not None and not other_rank():
            write_atomic(out, facts.to_json())
        out_.result(facts, facts_table(facts), *facts.notes, *_written("Facts", out))


@app.command(
    epilog="Example: batchlab plan digits --facts facts.json --devices 64 --goal time --out plan.json --explain"
)
def plan(
    job: JobSpec,
    facts: Annotated[Path, typer.Option(help="What probe measured.", metavar="FILE")],
    goal: GoalOption = Goal.BALANCED,
    devices: Annotated[int, typer.Option(min=1, help="The most devices that may be used.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples an update, in place of the plan's pick.", show_default="chosen")
    ] = None,
    out: FileOut = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the reason of every number.")] = False,
    target: Column = None,
    as_json: Json = False,
) -> None:
    """Choose the batch size for JOB from measured FACTS, and all that moves with it, and say why."""
    with output(as_json) as out_, progress_bar() as bar:
        arguments.check_file(out)
        measured = arguments.facts_in(facts)
        from batchlab.cli.tables import frontier_table, plan_table, reasons_table
        from batchlab.core.files import write_atomic
        from batchlab.spine.plan import plan as verb

        with bar.waiting("load the job"):
            what = arguments.load(job, target)
        chosen = verb(what, measured, goal=goal.value, devices=devices, batch_size=batch_size)
        if out is not None:
            write_atomic(out, chosen.to_json())
        tables = [plan_table(chosen, measured), frontier_table(chosen), *([reasons_table(chosen)] if explain else [])]
        out_.result(chosen, *tables, *chosen.notes, *_written("Plan", out))


@app.command(epilog="Example: batchlab train digits --plan plan.json --out runs/a; add --resume to go on after a stop")
def train(
    job: JobSpec,
    plan: Annotated[
        Path | None, typer.Option(help="What plan chose.", metavar="FILE", show_default="with --resume, the run's own")
    ] = None,
    out: RunOut = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: Device = None,
    max_steps: MaxSteps = None,
    batch_schedule: Annotated[
        BatchSchedule | None, typer.Option(help="adaptive follows the noise scale.", show_default="as planned")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="bf16 is autocast.", show_default="as planned")] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    target: Column = None,
    as_json: Json = False,
) -> None:
    """Train JOB as PLAN says, into a run folder that a crash does not spoil. Runs under torchrun too."""
    with output(as_json) as out_, progress_bar() as bar:
        if resume and out is None:
            raise InputError("--resume needs --out, the folder of the run to go on with")
        if plan is None and not resume:
            raise InputError("--plan is missing: make one with batchlab plan, or go on with a run by --resume")
        changes = {"steps": max_steps, "batch_schedule": batch_schedule and batch_schedule.value}
        changes |= {"precision": precision and precision.value, "compile": compile_ or None}
        chosen = arguments.chosen_plan(plan, out, changes)
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.report import terminal_report
        from batchlab.spine.train import train as verb

        with process_group():
            with bar.waiting("load the job"):
                what = arguments.load(job, target)
            folder = arguments.run_folder(out, what)
            done = verb(
                what,
                chosen,
                out=folder,
                seed=seed,
                resume=resume,
                device=device,
                callbacks=[lambda line: bar("train", line["step"] / chosen.steps)],
            )
        out_.result({"run": folder, "summary": done.summary}, terminal_report(done), f"Run: {folder}")


@app.command(epilog="Example: batchlab sweep digits --batch-sizes 16..1024 --trials 8 --out runs/sweep")
def sweep(
    job: JobSpec,
    batch_sizes: Annotated[
        str, typer.Option(help="Powers of two in 16..1024, a list as 16,48, or both.", metavar="SIZES")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder.", show_default="runs/JOB-TIME", metavar="DIR")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="What probe measured.", metavar="FILE", show_default="probed first")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Learning rates tried for each batch size.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with the best one, each with another seed.")] = 1,
    seed: Seed = 0,
    storage: Annotated[
        str | None, typer.Option(help="A database URL that workers share.", show_default="SQLite file in --out")
    ] = None,
    device: Device = None,
    target: Column = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    as_json: Json = False,
) -> None:
    """Measure steps to target against batch size, the learning rate tuned for each: the truth that a plan predicts."""
    with output(as_json) as out_, progress_bar() as bar:
        measured = None if facts is None else arguments.facts_in(facts)
        from batchlab.spine.report import terminal_report
        from batchlab.spine.sweep import sweep as verb

        with bar.waiting("load the job"):
            what = arguments.load(job, target, arguments.learning_target(at_least, at_most))
        folder = arguments.run_folder(out, what)
        study = verb(
            what,
            batch_sizes=batch_sizes,
            out=folder,
            trials=trials,
            seeds=seeds,
            seed=seed,
            facts=measured,
            storage=storage,
            device=device,
            progress=bar,
        )
        out_.result({"study": folder, "summary": study.summary}, terminal_report(study), f"Study: {folder}")


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


def _written(what: str, path: Path | None) -> list[str]:
    return [] if path is None else [f"{what}: {path}"]
