"""The study folder as sweeping processes write it: `study.json` in one move, `trials.jsonl` by whole lines."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.files import naming_storage_errors, write_atomic
from batchlab.core.job import Job
from batchlab.core.jsonio import dumps, to_plain
from batchlab.core.jsonl import append_line
from batchlab.core.provenance import git_commit, machine, versions
from batchlab.core.study import DATABASE_FILE, LOCK_FILE, SCHEMA, STUDY_FILE, TRIALS_FILE, Study
from batchlab.measure.runs.tradeoff import Tradeoff, fit_tradeoff
from batchlab.spine.sweep_search import HOPELESS_FACTOR, MOST_STEPS_FACTOR, RATE_FACTOR
from batchlab.spine.trial import RESOLUTION

_SAME_ON_RESUME = ("job", "target", "seed")


class SweepFolder:
    """A study folder open for adding to; any number of processes may hold it. spec: trials, seeds, batch sizes."""

    def __init__(self, path: Path, job: Job, facts: Facts, *, seed: int, **spec: Any) -> None:
        self.path, self.facts = path, facts
        self._meta = {
            "schema": SCHEMA,
            "name": job.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "running",
            "job": {
                "name": job.name,
                "unit": job.unit,
                "optimizer": job.optimizer,
                "train_examples": len(job.train),
                "valid_examples": len(job.valid),
            },
            "seed": seed,
            "target": to_plain(job.target),
            "target_origin": facts.target_origin,
            "spec": spec
            | {
                "rate_factor": RATE_FACTOR,
                "hopeless_factor": HOPELESS_FACTOR,
                "most_steps_factor": MOST_STEPS_FACTOR,
                "resolution": RESOLUTION,
            },
            "versions": versions(),
            "machine": machine(),
            "git_commit": git_commit(),
            "facts": to_plain(facts),
            "summary": None,
        }

    @property
    def database_url(self) -> str:
        """Of the SQLite file in the folder."""
        return f"sqlite:///{(self.path / DATABASE_FILE).resolve()}"

    @property
    def prefix(self) -> str:
        """What tells this sweep's trials from others in one storage: job, target and seed."""
        key = dumps([self._meta[name] for name in _SAME_ON_RESUME])
        return f"{self._meta['name']} {hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"

    def check(self) -> dict[str, Any] | None:
        """What `study.json` says, or None where there is none; `InputError` if it is of another job, target or seed."""
        if not (self.path / STUDY_FILE).is_file():
            return None
        before = Study.open(self.path).meta
        for name in _SAME_ON_RESUME:
            if before[name] != self._meta[name]:
                raise InputError(
                    f"{self.path} holds a study of another {name}, {before[name]!r}, not {self._meta[name]!r}: "
                    "name another folder"
                )
        return before

    def begin(self) -> None:
        """Writes `study.json`, or takes over the one that is there; batch sizes add up."""
        with self.locked():
            before = self.check()
            if before is not None:
                sizes = sorted({*before["spec"]["batch_sizes"], *self._meta["spec"]["batch_sizes"]})
                self._meta |= {"created": before["created"], "facts": before["facts"]}
                self._meta["spec"]["batch_sizes"] = sizes
            self._write("running", None)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time is inside."""
        with naming_storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("a")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a trial that ended."""
        append_line(self.path / TRIALS_FILE, record)

    def finish(self, status: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds what other workers found and this folder lacks, and writes what came of it all."""
        with self.locked():
            known = {trial["id"] for trial in Study.open(self.path).trials()}
            for record in records:
                if record["id"] not in known:
                    self.append(record)
            study = Study.open(self.path)
            seconds = math.fsum(trial["seconds"] for trial in study.trials())
            self._write(status, {"status": status, "seconds": seconds} | conclusions(study.rows(), self.facts))

    def _write(self, status: str, summary: dict[str, Any] | None) -> None:
        self._meta |= {"status": status, "summary": to_plain(summary)}
        write_atomic(self.path / STUDY_FILE, dumps(self._meta, indent=1))


def stored_facts(path: Path) -> Facts | None:
    """The facts that a study began with, or None where there is no study."""
    return Study.open(path).facts if (path / STUDY_FILE).is_file() else None


def conclusions(rows: Sequence[Mapping[str, Any]], facts: Facts) -> dict[str, Any]:
    """The trade-off that the rows say, beside what the noise scale predicted; by the names of `Study.summary`.

    optimism: by how much more steps the winners took with fresh seeds than in the search, a ratio over all sizes.
    """
    pairs = [(row["batch_size"], steps) for row in rows for steps in row["steps"]]
    pairs += [(row["batch_size"], None) for row in rows if row["trials"] and row["learning_rate"] is None]
    notes = [
        f"at batch size {row['batch_size']} the best learning rate, {row['learning_rate']:.3g}, lies at the edge of "
        "those tried: a better one may lie beyond"
        for row in rows
        if row["at_edge"]
    ]
    fit: Tradeoff | None = None
    try:
        fit = fit_tradeoff([size for size, _ in pairs], [steps for _, steps in pairs])
    except InputError as error:
        notes.append(f"no trade-off was fitted: {error}")
    if fit is not None and fit.note:
        notes.append(fit.note)
    predicted = facts.noise_scale
    ratio = fit.b_crit.value / predicted.value if fit and predicted.defined and predicted.value > 0 else None
    gains = [math.log(row["median"] / row["search_steps"]) for row in rows if row["median"]]
    return {
        "rows": list(rows),
        "tradeoff": None if fit is None else to_plain(fit),
        "predicted": to_plain(predicted),
        "ratio": ratio,
        "optimism": math.exp(math.fsum(gains) / len(gains)) if gains else None,
        "notes": notes,
    }
