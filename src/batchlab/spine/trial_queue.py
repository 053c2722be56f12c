"""The trials of a sweep in an Optuna storage that many workers share: each trial is run once, none is lost.

Optuna numbers the trials of a study without gaps or doubles, whoever asks. A worker that asks for one too many gives
it back unrun; one that stops puts its trial back; a dead worker's trial is put back by the next one that looks.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import InputError, StorageError
from batchlab.core.jsonio import to_plain
from batchlab.core.study import REACHED

if TYPE_CHECKING:
    import optuna

GOLDEN = (math.sqrt(5) - 1) / 2
LOST_AFTER_SECONDS = 3600.0
UNNAMED_SECONDS = 30.0
SEEN_EVERY_SECONDS = 60.0
_RECORD, _WORKER, _RANGE, _RUN, _SEEN, _WIDER = "record", "worker", "range", "run", "seen", "wider"
_KEPT = (_RANGE, _RUN)


def quasi_random(number: int) -> float:
    """The Kronecker sequence ½ + n·φ mod 1 of the golden ratio: 0.5 first, and evenly spread after any n.

    A function of the number alone, so that workers need not agree on who draws what.

    >>> [round(quasi_random(n), 3) for n in range(4)]
    [0.5, 0.118, 0.736, 0.354]
    """
    return (0.5 + number * GOLDEN) % 1.0


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna says nothing below a warning inside, and its verbosity is given back; `StorageError` where it fails."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise StorageError(f"the database of the trials refused: {error.__cause__ or error}") from error
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage at a database URL; SQLite waits up to a minute for another worker's write.

    Raises `InputError`, without the URL's password, where there is no such database or no driver for it.
    """
    import optuna
    import sqlalchemy

    try:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        raise InputError("storage must be a database URL, as in postgresql://user@host/name") from None
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise InputError(f"storage {shown} cannot be opened: {str(error).splitlines()[0]}") from error


class TrialQueue:
    """Trials of one kind, numbered from 0. name: of the Optuna study, made if it is not there."""

    def __init__(self, storage: optuna.storages.BaseStorage, name: str) -> None:
        import optuna

        self.name = name
        self._states = optuna.trial.TrialState
        self._study = optuna.create_study(
            storage=storage, study_name=name, sampler=_sampler(), direction="minimize", load_if_exists=True
        )

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _counted(self) -> list[optuna.trial.FrozenTrial]:
        """All but the failed: those given back, and those whose place another one took."""
        return [trial for trial in self._trials() if trial.state != self._states.FAIL]

    def running(self) -> int:
        """Trials that some worker is at, or that wait for one."""
        return sum(not trial.state.is_finished() for trial in self._trials())

    def records(self) -> list[dict[str, Any]]:
        """What the trials that ended were told to have found, by number."""
        return [t.user_attrs[_RECORD] for t in self._counted() if t.state.is_finished() and _RECORD in t.user_attrs]

    def fewest_steps(self) -> float:
        """The best so far; infinity before the first."""
        values = [t.values[0] for t in self._trials() if t.state == self._states.COMPLETE and t.values]
        return min(values, default=math.inf)

    def take(self, ranges: list[tuple[float, float, int]]) -> Claim | None:
        """The next trial to run, or None where as many as wanted are done, running or waiting elsewhere.

        ranges: (lowest, highest learning rate, number of trials wanted from it).
        """
        wanted = sum(count for _, _, count in ranges)
        self._put_back_lost()
        counted = self._counted()
        if len(counted) >= wanted and all(t.state != self._states.WAITING for t in counted):
            return None
        trial = self._study.ask()
        trial.set_user_attr(_WORKER, _this_worker())
        before = sum(t.number < trial.number and t.state != self._states.FAIL for t in self._trials())
        if before >= wanted:
            self._study.tell(trial, state=self._states.FAIL)
            return None
        low, high = trial.user_attrs.get(_RANGE) or _least_filled(ranges, counted)
        run = trial.user_attrs.get(_RUN, before)
        trial.set_user_attr(_RANGE, [low, high])
        trial.set_user_attr(_RUN, run)
        rate = low if low == high else trial.suggest_float("learning_rate", low, high, log=True)
        return Claim(self, trial, run, rate, low, high)

    def _put_back_lost(self) -> None:
        for trial in self._trials():
            if trial.state == self._states.RUNNING and _is_lost(trial.user_attrs, trial.datetime_start):
                self._put_back(trial.number, trial.params, trial.user_attrs)

    def _put_back(self, number: int, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """Fails a trial and lets another take its place, with its learning rate. Only one worker succeeds in that."""
        try:
            self._study.tell(number, state=self._states.FAIL)
        except (RuntimeError, ValueError):
            return
        if _RANGE in attributes:
            self._study.enqueue_trial(
                dict(params), user_attrs={key: attributes[key] for key in _KEPT if key in attributes}
            )

    def wider(self) -> list[tuple[float, float]]:
        """The ranges that a worker added by `widen`, in order."""
        return [(low, high) for low, high in self._study.user_attrs.get(_WIDER, [])]

    def widen(self, ranges: list[tuple[float, float]]) -> None:
        """Notes for all workers which ranges were added. All come to the same from the same trials."""
        self._study.set_user_attr(_WIDER, [list(pair) for pair in ranges])


class Claim:
    """A trial that this worker is to run.

    number: in its queue. run: that of the trial whose place it takes, else how many were before it.
    learning_rate: drawn from low..high by ratio.
    """

    def __init__(
        self, queue: TrialQueue, trial: optuna.trial.Trial, run: int, learning_rate: float, low: float, high: float
    ) -> None:
        self.queue, self.number, self.run = queue, trial.number, run
        self.learning_rate, self.low, self.high = learning_rate, low, high
        self._trial = trial
        self._seen = time.monotonic()

    @property
    def id(self) -> str:
        """A name that no other trial of the storage has."""
        return f"{self.queue.name} #{self.number}"

    def show_life(self) -> None:
        """Tells workers on other machines, at most once a minute, that this trial is not lost."""
        if time.monotonic() - self._seen >= SEEN_EVERY_SECONDS:
            self._seen = time.monotonic()
            self._trial.set_user_attr(_SEEN, time.time())

    def finish(self, record: Mapping[str, Any]) -> None:
        """Stores what came of it. A trial that was meanwhile given up for lost stays so: another took its place."""
        states, study = self.queue._states, self.queue._study
        try:
            self._trial.set_user_attr(_RECORD, to_plain(record))
            if record["status"] == REACHED:
                study.tell(self._trial, float(record["steps_to_target"]))
            else:
                study.tell(self._trial, state=states.PRUNED)
        except (RuntimeError, ValueError):
            if not any(t.number == self.number and t.state == states.FAIL for t in self.queue._trials()):
                raise

    def put_back(self) -> None:
        """Lets another run of this trial take its place, with the same learning rate."""
        self.queue._put_back(self.number, self._trial.params, self._trial.user_attrs)


def _least_filled(
    ranges: list[tuple[float, float, int]], counted: list[optuna.trial.FrozenTrial]
) -> tuple[float, float]:
    drawn = [tuple(trial.user_attrs.get(_RANGE, ())) for trial in counted]
    for low, high, count in ranges:
        if drawn.count((low, high)) < count:
            return low, high
    return ranges[-1][:2]


def _this_worker() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_lost(attributes: Mapping[str, Any], started: datetime | None) -> bool:
    """A worker of this machine that is gone; one of another machine that showed no life for an hour."""
    worker = attributes.get(_WORKER)
    age = math.inf if started is None else time.time() - started.timestamp()
    if worker is None:
        return age > UNNAMED_SECONDS
    if worker["host"] == socket.gethostname():
        return not _is_alive(worker["pid"], worker["born"])
    silent: float = min(age, time.time() - attributes.get(_SEEN, -math.inf))
    return silent > LOST_AFTER_SECONDS


def _is_alive(pid: int, born: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born is None or _born(pid) == born


@cache
def _sampler_class() -> Any:
    import optuna

    class QuasiRandom(optuna.samplers.BaseSampler):
        """Draws by the trial's run, evenly in the logarithm."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> float:
            low, high = distribution.low, distribution.high
            return float(low * (high / low) ** quasi_random(trial.user_attrs[_RUN]))

    return QuasiRandom


def _sampler() -> Any:
    return _sampler_class()()
