"""`Study`: steps to target against batch size. A folder with `study.json`, `trials.jsonl` and `study.db`.

One line of `trials.jsonl` is one trial that ended: a run at one batch size, learning rate and seed. All that a study
says follows from these lines (Shallue et al. 2019, arXiv 1811.03600).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.job import Target
from batchlab.core.jsonio import from_plain, loads
from batchlab.core.jsonl import read_lines

SCHEMA = 1
STUDY_FILE, TRIALS_FILE, DATABASE_FILE, LOCK_FILE = "study.json", "trials.jsonl", "study.db", "study.lock"
PLAN_TRIALS_FILE = "plan_trials.jsonl"
SEARCH, CONFIRM = "search", "confirm"
REACHED, NOT_REACHED, DIVERGED, INTERRUPTED = "reached", "not reached", "diverged", "interrupted"
EDGE = 0.05

Trial = Mapping[str, Any]


class Study:
    """A study folder, read only, also while it is written.

    path: the folder. meta: `study.json` (name, created, status, job, spec, target, seed, versions, machine, summary).
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self.meta = dict(meta)

    @classmethod
    def open(cls, path: str | Path) -> Study:
        """The study in a folder; `InputError` where there is none or it is from a newer batchlab."""
        path = Path(path)
        file = path / STUDY_FILE
        if not file.is_file():
            raise InputError(f"{path} is not a study folder: it has no {STUDY_FILE}")
        meta = loads(file.read_bytes(), source=str(file))
        if not isinstance(meta, dict) or not isinstance(meta.get("schema"), int) or "spec" not in meta:
            raise InputError(f"{file} does not describe a study")
        if meta["schema"] > SCHEMA:
            raise InputError(
                f"{file} has schema {meta['schema']}, from a newer batchlab; this one reads up to {SCHEMA}"
            )
        return cls(path, meta)

    @property
    def name(self) -> str:
        """The study's name: its job's."""
        return str(self.meta["name"])

    @cached_property
    def target(self) -> Target:
        """What counts as trained in every trial."""
        return from_plain(Target, self.meta["target"], source=str(self.path / STUDY_FILE))

    @cached_property
    def facts(self) -> Facts | None:
        """The facts that the learning rates were centred by, or None."""
        plain = self.meta.get("facts")
        return None if plain is None else from_plain(Facts, plain, source=str(self.path / STUDY_FILE))

    def trials(self) -> list[dict[str, Any]]:
        """One dict a trial that ended, each once, in the order written; a line still being written is left out.

        id; kind: "search", or "confirm" for one of its best with a fresh seed; batch_size; number: within its batch
        size and kind; learning_rate; low_rate, high_rate: the range it was drawn from; seed; status: "reached",
        "not reached" (within `steps` updates), "diverged" or "interrupted"; steps_to_target: updates, or None;
        resolution: updates since the evaluation before; steps, examples, seconds: of training, to the target or the
        end; metric: the target's, at the end; evaluations: (updates, metric).
        """
        return list({trial["id"]: trial for trial in read_lines(self.path / TRIALS_FILE)}.values())

    def plan_trials(self) -> list[dict[str, Any]]:
        """Runs of the plan that the study was to verify, each with a fresh seed, by the names of `trials`; or none."""
        return list(read_lines(self.path / PLAN_TRIALS_FILE))

    def best(self, batch_size: int) -> dict[str, Any] | None:
        """The search trial whose learning rate is the best, as `chosen` finds it. None if none reached the target.

        Its steps are too good on average, for it was chosen by them: `rows` has those of fresh seeds.
        """
        found = chosen([trial for trial in self.trials() if trial["batch_size"] == batch_size])
        return None if found is None else dict(found)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a batch size, ascending, as `row` makes them."""
        trials = self.trials()
        sizes = {trial["batch_size"] for trial in trials} | set(self.meta["spec"]["batch_sizes"])
        return [row(size, [trial for trial in trials if trial["batch_size"] == size]) for size in sorted(sizes)]

    @property
    def summary(self) -> dict[str, Any]:
        """What came of it: status, rows, seconds, tradeoff (or None), predicted, ratio, notes.

        status: "finished", "interrupted", or "running" (also after a crash). tradeoff: the fitted law as plain JSON.
        predicted: the critical batch size that the noise scale predicts; ratio: measured over predicted.
        """
        stored = self.meta.get("summary")
        if stored:
            return dict(stored)
        seconds = math.fsum(trial["seconds"] for trial in self.trials())
        empty: dict[str, Any] = {"tradeoff": None, "predicted": None, "ratio": None, "notes": []}
        return {"status": "running", "rows": self.rows(), "seconds": seconds} | empty


def contenders(trials: Iterable[Trial]) -> list[Trial]:
    """The search trials of one batch size that reached the target: by updates to it, then by number.

    Diverged, interrupted and unsuccessful trials are never among them.
    """
    good = [trial for trial in trials if trial["kind"] == SEARCH and trial["status"] == REACHED]
    return sorted(good, key=lambda trial: (trial["steps_to_target"], trial["number"]))


def chosen(trials: Sequence[Trial]) -> Trial | None:
    """Of the contenders whose learning rate ran again with the most fresh seeds, the one of the fewest steps there.

    By the median; a run that did not reach the target counts as longer than any that did. The first contender before
    any ran again, None where there is none.
    """
    fresh: dict[float, list[float]] = {}
    for trial in trials:
        if trial["kind"] == CONFIRM and trial["status"] != INTERRUPTED:
            steps = trial["steps_to_target"]
            fresh.setdefault(trial["learning_rate"], []).append(math.inf if steps is None else steps)
    found = contenders(trials)
    most = max((len(fresh.get(trial["learning_rate"], ())) for trial in found), default=0)
    if most:
        found = [trial for trial in found if len(fresh.get(trial["learning_rate"], ())) == most]
        found.sort(key=lambda trial: statistics.median(fresh[trial["learning_rate"]]))
    return found[0] if found else None


def at_edge(trials: Iterable[Trial], learning_rate: float) -> int:
    """-1 or 1 where a learning rate lies in the outer 5 % of those tried, by ratio, at the low or high end; else 0.

    >>> tried = [{"kind": "search", "status": "reached", "learning_rate": 10.0**-k} for k in range(5)]
    >>> at_edge(tried, 1e-4), at_edge(tried, 1e-2), at_edge(tried, 1.0)
    (-1, 0, 1)
    """
    ended = [trial for trial in trials if trial["kind"] == SEARCH and trial["status"] != INTERRUPTED]
    logs = [math.log(trial["learning_rate"]) for trial in ended]
    low, high = min(logs), max(logs)
    margin = EDGE * (high - low)
    place = math.log(learning_rate)
    return 1 if place >= high - margin else -1 if place <= low + margin else 0


def row(batch_size: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """What the trials of one batch size say together. Steps are updates; None where there is no such number.

    learning_rate: the best, as `chosen` finds it. search_steps: those of its search trial, too good on average.
    steps: those of the same learning rate with fresh seeds, None for one that did not reach the target; `seeds`.
    median, low, high: of `steps`, a run that did not reach the target counting as longer than any that did.
    examples, seconds: medians of the same runs, to the target or the end. resolution: the most updates between two
    evaluations at the target. at_edge: whether the best lies in the outer 5 % of the learning rates tried: the best
    may be beyond. trials, reached, diverged: counts of search trials that ended.
    """
    ended = [trial for trial in trials if trial["kind"] == SEARCH and trial["status"] != INTERRUPTED]
    best = chosen(trials)
    result: dict[str, Any] = {
        "batch_size": batch_size,
        "learning_rate": None if best is None else best["learning_rate"],
        "search_steps": None if best is None else best["steps_to_target"],
        "at_edge": best is not None and at_edge(trials, best["learning_rate"]) != 0,
        "trials": len(ended),
        "reached": sum(trial["status"] == REACHED for trial in ended),
        "diverged": sum(trial["status"] == DIVERGED for trial in ended),
    }
    rate = result["learning_rate"]
    fresh = [t for t in trials if t["kind"] == CONFIRM and t["status"] != INTERRUPTED and t["learning_rate"] == rate]
    fresh.sort(key=lambda trial: trial["seed"])
    steps = [math.inf if trial["steps_to_target"] is None else trial["steps_to_target"] for trial in fresh]
    return result | {
        "seeds": [trial["seed"] for trial in fresh],
        "steps": [_known(value) for value in steps],
        "median": _known(statistics.median(steps)) if steps else None,
        "low": _known(min(steps)) if steps else None,
        "high": _known(max(steps)) if steps else None,
        "examples": statistics.median(trial["examples"] for trial in fresh) if fresh else None,
        "seconds": statistics.median(trial["seconds"] for trial in fresh) if fresh else None,
        "resolution": max((trial["resolution"] for trial in fresh if trial["resolution"]), default=None),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
