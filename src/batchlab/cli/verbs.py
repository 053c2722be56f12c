"""The verbs that compute: each reads its arguments, calls the Python verb of its name, and shows what came of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from batchlab.cli import arguments
from batchlab.cli.app import app
from batchlab.cli.console import output, progress_bar
from batchlab.cli.ending import other_rank
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
    RunSeed,
    Schedule,
    Seed,
)
from batchlab.core.errors import InputError


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
        aim = arguments.learning_target(at_least, at_most)
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.report import terminal_report
        from batchlab.spine.tune import REPORT_FILE, STUDY_FOLDER
        from batchlab.spine.tune import tune as verb

        with process_group(device=device):
            with bar.waiting("load the job"):
                what = arguments.load(job, target, aim)
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
        shown = [terminal_report(done), *done.plan.notes]
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
    only: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT,...",
            help="Only these: noise, memory, curvature, energy, landscape. No plan can be made from them.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="With --only: at the weights of this run, whose report then shows them.",
            show_default=False,
        ),
    ] = None,
    target: Column = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    as_json: Json = False,
) -> None:
    """Measure JOB on this machine: speed, memory, noise scale, a good learning rate. Its model is not touched."""
    with output(as_json) as out_, progress_bar() as bar:
        arguments.check_file(out)
        aim = arguments.learning_target(at_least, at_most)
        if only is not None or at is not None:
            if aim is not None:
                raise InputError("--at-least and --at-most are for all facts: none of --only depends on a target")
            _single_facts(job, only, at, out, out_, bar, target, budget=budget, seed=seed, device=device)
            return
        from batchlab.cli.tables import facts_table
        from batchlab.core.files import write_atomic
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.probe import probe as verb

        with process_group(device=device):
            with bar.waiting("load the job"):
                what = arguments.load(job, target, aim)
            facts = verb(what, budget=budget, seed=seed, device=device, progress=bar)
        if out is not None and not other_rank():
            write_atomic(out, facts.to_json())
        out_.result(facts, facts_table(facts), *facts.warnings, *facts.notes, *_written("Facts", out))


def _single_facts(
    job: str,
    only: str | None,
    at: Path | None,
    out: Path | None,
    out_: Any,
    bar: Any,
    target: str | None,
    **settings: Any,
) -> None:
    """`probe --only`: shown, written to a file if asked, and kept in the run that they belong to."""
    if only is None:
        raise InputError("--at is for --only: all that a plan needs is measured on fresh weights")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--only measures in one process: run it without torchrun")
    from batchlab.cli.tables import findings_table
    from batchlab.core.files import write_atomic
    from batchlab.core.run import Run
    from batchlab.spine.findings import keep
    from batchlab.spine.probe import probe as verb

    run = None if at is None else Run.open(at)
    with bar.waiting("load the job"):
        what = arguments.load(job, target, None)
    kinds = [kind.strip() for kind in only.split(",") if kind.strip()]
    found = verb(what, only=kinds, at=run, progress=bar, **settings)
    if run is not None:
        keep(run, found)
    if out is not None:
        write_atomic(out, found.to_json())
    kept = [] if run is None else [f"Kept in {run.path}: batchlab report {run.path} shows it"]
    out_.result(found, findings_table(found), *found.notes, *kept, *_written("Findings", out))


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
    seed: RunSeed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: Device = None,
    max_steps: MaxSteps = None,
    batch_schedule: Annotated[
        BatchSchedule | None,
        typer.Option(help="How the batch moves; adaptive follows the noise scale.", show_default="as planned"),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help="Of the learning rate, after its warm-up; one_cycle needs none.", show_default="as planned"),
    ] = None,
    batch_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of --batch-schedule, may be repeated.", show_default="as planned"),
    ] = None,
    schedule_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of --schedule, may be repeated.", show_default="as planned"),
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
        changes: dict[str, Any] = {"steps": max_steps, "batch_schedule": batch_schedule and batch_schedule.value}
        changes |= {"schedule": schedule and schedule.value}
        changes |= {"batch_settings": arguments.settings(batch_set, "--batch-set", of=batch_schedule)}
        changes |= {"schedule_settings": arguments.settings(schedule_set, "--schedule-set", of=schedule)}
        changes |= {"precision": precision and precision.value, "compile": compile_ or None}
        chosen = arguments.chosen_plan(plan, out, changes)
        if schedule == Schedule.ONE_CYCLE:
            chosen = chosen.because('the schedule "one_cycle" warms up by itself', "batchlab", warmup_examples=0)
        from batchlab.parallel.torchrun import process_group
        from batchlab.spine.report import terminal_report
        from batchlab.spine.train import train as verb

        with process_group(device=device):
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
                callbacks=[lambda line: bar("train", min(1.0, line["position"] / chosen.examples))],
            )
        out_.result({"run": folder, "summary": done.summary}, terminal_report(done), *done.plan.notes, f"Run: {folder}")


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
        aim = arguments.learning_target(at_least, at_most)
        measured = None if facts is None else arguments.facts_in(facts)
        from batchlab.spine.report import terminal_report
        from batchlab.spine.sweep import sweep as verb

        with bar.waiting("load the job"):
            what = arguments.load(job, target, aim)
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


def _written(what: str, path: Path | None) -> list[str]:
    return [] if path is None else [f"{what}: {path}"]
