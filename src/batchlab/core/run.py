"""`Run`: what happened. A folder with `run.json`, `steps.jsonl` and `checkpoints/`, readable while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.jsonio import from_plain, loads
from batchlab.core.jsonl import read_lines
from batchlab.core.plan import Plan

SCHEMA = 1
RUN_FILE, STEPS_FILE, CHECKPOINTS, LOCK_FILE = "run.json", "steps.jsonl", "checkpoints", "run.lock"


class Run:
    """A run folder, read only; what is read is what is on disk when the object first needs it.

    path: the folder. meta: `run.json` (name, created, status, job, seed, versions, machine, git_commit, ...).
    plan: the plan that was run. facts: the facts it was made from, if they were given.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self.meta = dict(meta)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder; `InputError` where there is none or it is from a newer batchlab."""
        path = Path(path)
        file = path / RUN_FILE
        if not file.is_file():
            raise InputError(f"{path} is not a run folder: it has no {RUN_FILE}")
        meta = loads(file.read_bytes(), source=str(file))
        if not isinstance(meta, dict) or not isinstance(meta.get("schema"), int) or "plan" not in meta:
            raise InputError(f"{file} does not describe a run")
        if meta["schema"] > SCHEMA:
            raise InputError(
                f"{file} has schema {meta['schema']}, from a newer batchlab; this one reads up to {SCHEMA}"
            )
        return cls(path, meta)

    @cached_property
    def plan(self) -> Plan:
        """The plan that was run."""
        return from_plain(Plan, self.meta["plan"], source=str(self.path / RUN_FILE))

    @cached_property
    def facts(self) -> Facts | None:
        """The facts that the plan was made from, or None."""
        plain = self.meta.get("facts")
        return None if plain is None else from_plain(Facts, plain, source=str(self.path / RUN_FILE))

    @property
    def name(self) -> str:
        """The run's name: its folder's, unless one was given."""
        return str(self.meta["name"])

    def steps(self) -> Iterator[dict[str, Any]]:
        """One dict an update, in order: step, position, batch_size, lr, loss, grad_norm, noise_scale, seconds,
        examples_per_second, skipped, `valid` where there was an evaluation, and `capped`, true, where a batch that
        moves would have been larger but for its maximum.

        Counts are in examples; non-finite numbers are the strings "nan", "inf", "-inf". A line still being
        written is left out.
        """
        return read_lines(self.path / STEPS_FILE)

    @property
    def summary(self) -> dict[str, Any]:
        """What came of it: status, steps, examples, seconds, target_step, target_seconds, predicted_steps,
        final (metric -> value), skipped_steps. predicted_steps: None too where the batch moves.

        status: "reached", "not reached" (the target, in the planned steps), "finished" (no target),
        "interrupted", "stopped" (by an error), or "running" (also after a crash).
        """
        stored = self.meta.get("summary")
        return dict(stored) if stored else summarize(self.steps(), self.plan, "running")


def summarize(steps: Iterator[dict[str, Any]], plan: Plan, status: str) -> dict[str, Any]:
    """The summary of a sequence of step lines. Times are sums of the steps' seconds, evaluations left out."""
    summary: dict[str, Any] = {
        "status": status,
        "steps": 0,
        "examples": 0,
        "seconds": 0.0,
        "target_step": None,
        "target_seconds": None,
        "predicted_steps": plan.prediction.value if plan.prediction else None,
        "final": {},
        "skipped_steps": 0,
    }
    for line in steps:
        summary["steps"], summary["examples"] = line["step"], line["position"]
        summary["seconds"] += line["seconds"]
        summary["skipped_steps"] += bool(line.get("skipped"))
        if "valid" not in line:
            continue
        summary["final"] = line["valid"]
        measured = line["valid"].get(plan.target.metric) if plan.target else None
        reached = plan.target is not None and isinstance(measured, float | int) and plan.target.reached(measured)
        if reached and summary["target_step"] is None:
            summary["target_step"], summary["target_seconds"] = line["step"], summary["seconds"]
    return summary
