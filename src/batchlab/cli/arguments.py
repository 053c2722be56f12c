"""What is written on the command line, as what the Python verbs take."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import InputError

if TYPE_CHECKING:
    from batchlab.core.facts import Facts
    from batchlab.core.job import Job, Target
    from batchlab.core.plan import Plan
    from batchlab.core.run import Run
    from batchlab.core.study import Study
    from batchlab.planner.hardware import Device


def learning_target(at_least: str | None, at_most: str | None) -> Target | None:
    """The target that `--at-least METRIC=VALUE` or `--at-most METRIC=VALUE` names; None if neither was given.

    >>> learning_target("accuracy=0.97", None)
    Target(metric='accuracy', value=0.97, direction='max')
    """
    if at_least is not None and at_most is not None:
        raise InputError("give --at-least or --at-most, not both")
    if at_least is None and at_most is None:
        return None
    metric, value = _metric_and_value("--at-least" if at_most is None else "--at-most", at_least or at_most or "")
    from batchlab.core.job import Target

    return Target(metric, value, "max" if at_most is None else "min")


def _metric_and_value(option: str, text: str) -> tuple[str, float]:
    metric, _, value = text.rpartition("=")
    with contextlib.suppress(ValueError):
        if metric.strip() and math.isfinite(float(value)):
            return metric.strip(), float(value)
    raise InputError(f"{option} must be METRIC=VALUE with a finite number, got {text!r}")


def load(spec: str, column: str | None = None, target: Target | None = None) -> Job:
    """The job that JOB names. column: what `--target` names, for table jobs. target: replaces the job's own."""
    if column is not None and not (spec.startswith("table:") or ".py" in spec):
        raise InputError(
            f"--target names a column of a table job, and {spec!r} is none; "
            "when a run counts as trained is said by --at-least or --at-most"
        )
    import dataclasses

    from batchlab.workloads.resolve import load_job

    options: dict[str, Any] = {} if column is None else {"target": column}
    job = load_job(spec, **options)
    return job if target is None else dataclasses.replace(job, target=target)


def run_folder(out: Path | None, job: Job) -> Path:
    """`--out`, or `runs/<job>-<time>`; under torchrun the ranks' clocks differ, so there it must be given."""
    if out is not None:
        return out
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("under torchrun, --out must say where the run goes: it must be the same on every rank")
    name = re.sub(r"[^\w.-]+", "-", job.name).strip("-.") or "job"
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def facts_in(path: Path) -> Facts:
    """The facts in a file."""
    from batchlab.core.facts import Facts

    return Facts.from_json(read(path, "facts"), source=str(path))


def read(path: Path, what: str) -> bytes:
    """A file that the command line names; `InputError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None


def check_file(out: Path | None) -> None:
    """Refuses, before anything is computed, an output file that is a folder or whose folder is a file."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"--out must name a file, {out} is a folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"--out cannot be {out}: {parent} is not a folder")


def chosen_plan(path: Path | None, out: Path | None, changes: Mapping[str, Any]) -> Plan:
    """The plan in a file, or with no file the one of the run in `out`; `changes` that are not None are made to it."""
    import dataclasses

    from batchlab.core.plan import Plan
    from batchlab.core.run import Run

    if path is not None:
        plan = Plan.from_json(read(path, "plan"), source=str(path))
    else:
        assert out is not None
        plan = Run.open(out).plan
    return dataclasses.replace(plan, **{name: value for name, value in changes.items() if value is not None})


def opened(folder: Path) -> Run | Study:
    """The run or the study in a folder; `InputError` where there is neither."""
    from batchlab.core.run import RUN_FILE, Run
    from batchlab.core.study import STUDY_FILE, Study

    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    if not ((folder / RUN_FILE).exists() or (folder / STUDY_FILE).exists()):
        raise InputError(f"{folder} holds neither a run nor a study; for many runs at once: batchlab runs {folder}")
    return Run.open(folder) if (folder / RUN_FILE).exists() else Study.open(folder)


def json_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file holds."""
    from batchlab.core.jsonio import loads

    found = loads(read(path, what), source=str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, the {what}, got {type(found).__name__}")
    return found


def accelerator(name: str, hardware: Path | None) -> Device:
    """The accelerator of that name, of the packaged table or the user's file."""
    from batchlab.planner.hardware import hardware as table

    known = table(hardware)
    if name not in known:
        raise InputError(f"device must be one of {', '.join(sorted(known))}, got {name!r}; --hardware FILE adds yours")
    return known[name]


def named_values(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as integers, numbers or lists of numbers where they are, else as text.

    >>> named_values(["x=tokens", "draws=20", "within=1e1", "target_losses=3.2,3.4"])
    {'x': 'tokens', 'draws': 20, 'within': 10.0, 'target_losses': (3.2, 3.4)}
    """
    values = {name: _value(value) for name, value in _pairs(texts, "--set")}
    for name in {"table", "law"} & set(values):
        raise InputError(f"--set must name an option of the law, got {name!r}")
    return values


def settings(texts: Sequence[str] | None, option: str, *, of: object) -> dict[str, Any] | None:
    """NAME=VALUE, a value as JSON has it or else as text. Without any: none where `of`, whose they are, is given anew,
    else None, for those of the plan.

    >>> settings(["end=512", "headroom=null", "sizes=[[0, 64], [1000, 128]]"], "--batch-set", of="ramp")
    {'end': 512, 'headroom': None, 'sizes': [[0, 64], [1000, 128]]}
    """
    import json

    found: dict[str, Any] = {}
    for name, value in _pairs(texts or (), option):
        found[name] = value
        with contextlib.suppress(ValueError):
            found[name] = json.loads(value)
    return found or ({} if of else None)


def _pairs(texts: Sequence[str], option: str) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not name or not sign or not value:
            raise InputError(f"{option} must be NAME=VALUE, got {text!r}")
        yield name, value


def _value(text: str) -> int | float | str | tuple[float, ...]:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        return tuple(map(float, text.split(",")))
    return text
