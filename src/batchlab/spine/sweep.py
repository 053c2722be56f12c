"""`sweep`: steps to target against batch size, the learning rate tuned at each. The truth that plans are held against.

Shallue et al. 2019 (arXiv 1811.03600): at each batch size the learning rate is searched anew, and the fewest steps to
a goal on held-out data count. The winner of a search is lucky, so it runs again with fresh seeds, and those count;
where they take so much longer that another contender may be better, that one runs again too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import Signals

import torch.distributed as dist

from batchlab.core.batch_sizes import parse_batch_sizes
from batchlab.core.checks import check_count
from batchlab.core.errors import InputError, Interrupted
from batchlab.core.facts import Facts
from batchlab.core.job import Job
from batchlab.core.model import check_fresh
from batchlab.core.random import preserved_generators
from batchlab.core.store import check_folder
from batchlab.core.study import INTERRUPTED, SEARCH, Study
from batchlab.spine.probe import probe
from batchlab.spine.signals import StopSignals
from batchlab.spine.sweep_folder import SweepFolder, stored_facts
from batchlab.spine.sweep_search import BatchSearch, Task, trial_plan
from batchlab.spine.trial import run_trial
from batchlab.spine.trial_queue import open_storage, quiet_optuna

Progress = Callable[[str, float], None]

WAIT_SECONDS = 0.2


def sweep(
    job: Job,
    *,
    batch_sizes: str | Sequence[int],
    out: str | Path,
    trials: int = 8,
    seeds: int = 1,
    seed: int = 0,
    facts: Facts | None = None,
    storage: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Study:
    """Measures steps to target at each batch size, fits the trade-off, and writes the folder `out`.

    batch_sizes: examples an update, or a text that `parse_batch_sizes` reads. trials: learning rates tried at each,
    evenly in the logarithm over 1/4 to 4 times what the planner's rule gives; where the best lies in the outer 5 % of
    those tried, half as many more beyond it, at most three times. seeds: fresh seeds with which the
    best run again (one, or up to four while the median is more than a fifth above what the search saw of the next),
    others at each batch size, so that the fit's residuals show a seed's luck too. seed: of the search, the same
    in all its trials; the fresh ones are drawn from it.
    facts: of `job`, for the target, the base learning rate and the expected steps; probed if None.
    storage: database URL that workers on many machines share; a SQLite file in `out` if None.
    progress: called as `progress("sweep", fraction done)`.

    A trial stops at the target, at twice the fewest steps so far at its batch size, at four times the expected steps,
    or when it diverges. All else of it is the planner's for that batch size. Seconds are of training alone.

    Called again with the same `out` it goes on: what ended is not run again, also with more trials, seeds or batch
    sizes. Several processes may be at one sweep at once. On SIGINT or SIGTERM the trial at hand is put back and
    `Interrupted` raised. Raises `InputError` for bad arguments, with nothing written, and for a study in `out` of
    another job, target or seed.
    """
    sizes, path = parse_batch_sizes(batch_sizes), Path(out)
    _check(job, sizes, trials=trials, seeds=seeds, seed=seed)
    check_folder(path)
    with preserved_generators():
        check_fresh(job)
    known = stored_facts(path) or facts or probe(job, seed=seed, device=device, progress=progress)
    aimed = job if job.target else dataclasses.replace(job, target=(facts or known).target)
    folder = SweepFolder(path, aimed, known, seed=seed, batch_sizes=sizes, trials=trials, seeds=seeds)
    folder.check()
    plans = [trial_plan(aimed, known, size) for size in sizes]
    with StopSignals() as signals, quiet_optuna():
        shared = None if storage is None else open_storage(storage)
        folder.begin()
        with folder.locked():
            database = shared or open_storage(folder.database_url)
        searches = [BatchSearch(database, folder.prefix, p, trials=trials, seeds=seeds, seed=seed) for p in plans]
        status = "interrupted"
        try:
            while (task := _next_task(searches, signals)) is not None:
                _run(task, aimed, folder, signals, device)
                if progress is not None:
                    progress("sweep", _share_done(searches))
            _raise_if_stopped(signals, path)
            status = "finished"
        finally:
            folder.finish(status, [record for search in searches for record in search.records()])
    return Study.open(path)


def _next_task(searches: Sequence[BatchSearch], signals: StopSignals) -> Task | None:
    """The next trial that nobody is at; waits while only other workers have any. None at the end, or on a signal."""
    while not signals.requested:
        for search in searches:
            task = search.next_task()
            if task is not None:
                return task
        if all(search.finished for search in searches):
            return None
        time.sleep(WAIT_SECONDS)
    return None


def _run(task: Task, job: Job, folder: SweepFolder, signals: StopSignals, device: str | None) -> None:
    """Runs a trial and stores what came of it; on a signal or an error, puts it back for another worker."""
    ended = False
    try:
        outcome = run_trial(
            job,
            task.plan,
            seed=task.seed,
            expected_steps=task.expected_steps,
            device=device,
            most_steps=task.most_steps,
            stop=lambda: bool(signals.requested),
            untrained=task.kind == SEARCH,
        )
        record = task.record(outcome)
        ended = record["status"] != INTERRUPTED
        if ended:
            task.claim.finish(record)
        folder.append(record)
    finally:
        if not ended:
            task.claim.put_back()


def _share_done(searches: Sequence[BatchSearch]) -> float:
    counts = [search.counts() for search in searches]
    return sum(done for done, _ in counts) / sum(wanted for _, wanted in counts)


def _raise_if_stopped(signals: StopSignals, path: Path) -> None:
    if signals.requested:
        raise Interrupted(
            f"stopped by {Signals(signals.requested).name}; sweep into {path} again to go on", signals.requested
        )


def _check(job: Job, sizes: Sequence[int], *, seed: int, **counts: int) -> None:
    if not isinstance(job, Job):
        raise InputError(f"job must be a batchlab.Job, got {type(job).__name__}")
    check_count(0, seed=seed)
    check_count(**counts)
    if sizes[-1] > len(job.train):
        raise InputError(f"batch_sizes must be at most the data set's {len(job.train)} examples, got {sizes[-1]}")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError("sweep runs in single processes: start one for each device, with the same out or storage")
