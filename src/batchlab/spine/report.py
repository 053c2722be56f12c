"""`report`: one self-contained HTML page of a run or a study, and the same in a few lines for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core.errors import InputError
from batchlab.core.files import write_atomic
from batchlab.core.run import Run
from batchlab.core.study import STUDY_FILE, Study
from batchlab.spine.words import moment

if TYPE_CHECKING:
    from rich.table import Table

    from batchlab.viz.blocks import Section

STUDY_FOLDER = "sweep"


def report(run_or_study: Run | Study, path: str | Path) -> Path:
    """Writes the page to the file `path`, whole or not at all, and returns it. It opens with no network.

    run_or_study: as read from its folder, also while it is being written: what is there is shown, and what is
    missing is said, with how to get it. A run is shown with the sweep in its own folder, if it has one. Traces of
    more than 2,000 steps are thinned; first, last and extreme steps stay.

    Raises `InputError` for anything else or if `path` is a folder, `StorageError` if the disk refuses.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"path must name the file to write, got the folder {str(target)!r}: {target / 'report.html'}")
    if not isinstance(run_or_study, (Run, Study)):
        raise InputError(f"report takes a Run or a Study, got {type(run_or_study).__name__}")
    from batchlab.viz.page import page

    found = _run_page(run_or_study) if isinstance(run_or_study, Run) else _study_page(run_or_study)
    title, subtitle, sections = found
    write_atomic(target, page(title, sections, subtitle=subtitle))
    return target


def terminal_report(run_or_study: Run | Study) -> Table:
    """What the page's first part says, as a `rich` table."""
    from batchlab.spine import headline, study_chapters
    from batchlab.viz.table import terminal_table

    if isinstance(run_or_study, Run):
        lines, said = headline.of_run(run_or_study), headline.verdict(run_or_study.plan, run_or_study.summary).text
    else:
        lines, said = study_chapters.findings(run_or_study), study_chapters.verdict(run_or_study)[0]
    return terminal_table(run_or_study.name, lines, said)


def _run_page(run: Run) -> tuple[str, str, list[Section]]:
    from batchlab.spine import chapters, study_chapters
    from batchlab.spine.columns import columns
    from batchlab.spine.course_chapter import course
    from batchlab.spine.scaling_chapter import where_more_batch_helps
    from batchlab.spine.tensor_chapter import tensors, tensors_of

    watched = tensors(tensors_of(run.steps()))
    plan, facts, study = run.plan, run.facts, _own_study(run)
    taken = columns(run.steps(), run.meta.get("initial"))
    scheduled = course(plan, taken)
    sections = [
        chapters.what_to_do(run),
        chapters.frontier(plan),
        *([] if scheduled is None else [scheduled]),
        chapters.noise(plan, facts, taken),
        chapters.loss(run, taken),
        chapters.machine_limits(plan, facts),
        chapters.learning_rates(plan, facts),
        *([] if watched is None else [watched]),
        chapters.reasons(plan),
        *(
            [chapters.not_verified()]
            if study is None
            else [
                study_chapters.measured_against_predicted(study, facts, plan, run.summary),
                where_more_batch_helps(study),
                study_chapters.tuned(study, plan),
            ]
        ),
        *_measured_at(run),
        chapters.limits(facts),
        chapters.provenance({**run.meta, "status": run.summary["status"]}),
    ]
    return f"batchlab: {run.name}", f"Goal: {plan.goal}. Begun {moment(run.meta.get('created'))}.", sections


def _study_page(study: Study) -> tuple[str, str, list[Section]]:
    from batchlab.spine import chapters, study_chapters
    from batchlab.spine.scaling_chapter import where_more_batch_helps

    sections = [
        study_chapters.found(study),
        study_chapters.measured_against_predicted(study, study.facts, None, {}),
        where_more_batch_helps(study),
        study_chapters.tuned(study),
        study_chapters.all_rows(study),
        study_chapters.sweep_limits(study),
        chapters.provenance({**study.meta, "status": study.summary["status"]}),
    ]
    return f"batchlab sweep: {study.name}", f"Begun {moment(study.meta.get('created'))}.", sections


def _measured_at(run: Run) -> list[Section]:
    """What probe(only=..., at=run) measured at the run's weights."""
    from batchlab.measure.findings import FINDINGS_FILE

    if not (run.path / FINDINGS_FILE).is_file():
        return []
    from batchlab.spine.findings import found_in
    from batchlab.spine.findings_chapters import sections

    found = found_in(run)
    return [] if found is None else sections(found)


def _own_study(run: Run) -> Study | None:
    folder = run.path / STUDY_FOLDER
    return Study.open(folder) if (folder / STUDY_FILE).is_file() else None
