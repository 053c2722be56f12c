"""What is to be run at one batch size: the search for a learning rate, then its best again with fresh seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchlab.core.facts import Facts
from batchlab.core.job import Job
from batchlab.core.plan import Plan
from batchlab.core.random import derive_seed
from batchlab.core.study import CONFIRM, SEARCH, Trial, at_edge, contenders
from batchlab.spine.plan import plan as make_plan
from batchlab.spine.trial_queue import Claim, TrialQueue

if TYPE_CHECKING:
    import optuna

RATE_FACTOR = 4.0
WIDENINGS = 3
FEWEST_TO_WIDEN = 3
HOPELESS_FACTOR = 2.0
MOST_STEPS_FACTOR = 4.0
CONTENDERS, LUCK = 4, 1.2
LOOK_EVERY_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """A trial to run. expected_steps: to the target. most_steps: asked along the way, past which it is hopeless."""

    claim: Claim
    kind: str
    plan: Plan
    seed: int
    expected_steps: float
    most_steps: Callable[[], float]

    def record(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """A line of `trials.jsonl`."""
        claim = self.claim
        return {
            "id": claim.id,
            "kind": self.kind,
            "batch_size": self.plan.batch_size,
            "number": claim.number,
            "learning_rate": claim.learning_rate,
            "low_rate": claim.low,
            "high_rate": claim.high,
            "seed": self.seed,
        } | outcome


def trial_plan(job: Job, facts: Facts, batch_size: int) -> Plan:
    """The planner's plan for a batch size, for trials: the noise is not measured, and the steps are bounded.

    The bound is four times the most steps that the facts allow for: B_crit and the base learning rate may be wrong.
    """
    planned = make_plan(job, facts, batch_size=batch_size)
    micro = facts.best_micro_batch(batch_size)
    most = planned.steps if planned.predicted_steps is None else planned.predicted_steps.high
    return dataclasses.replace(
        planned,
        micro_batch=micro,
        accumulation=math.ceil(batch_size / micro),
        steps=math.ceil(MOST_STEPS_FACTOR * most),
        measure_noise=False,
        reasons={},
        frontier=(),
    )


class BatchSearch:
    """The trials of one batch size. prefix: of the names of its Optuna studies. plan: as `trial_plan` makes it."""

    def __init__(
        self, storage: optuna.storages.BaseStorage, prefix: str, plan: Plan, *, trials: int, seeds: int, seed: int
    ) -> None:
        self.plan, self.trials, self.seeds, self.seed = plan, trials, seeds, seed
        self.finished = False
        self._storage, self._name = storage, f"{prefix} batch {plan.batch_size}"
        self._search = TrialQueue(storage, f"{self._name} {SEARCH}")
        self._confirm: dict[float, TrialQueue] = {}

    @property
    def expected_steps(self) -> float:
        """Steps to the target by the planner; a quarter of the plan's steps where it did not say."""
        predicted = self.plan.predicted_steps
        return self.plan.steps / MOST_STEPS_FACTOR if predicted is None else predicted.value

    def next_task(self) -> Task | None:
        """A trial that is now this worker's; None where there is none to be had now, or, if `finished`, ever."""
        if self.finished:
            return None
        claim = self._search.take(self._ranges())
        if claim is not None:
            watch = _Hopeless(self._search, claim)
            return Task(claim, SEARCH, self._at(claim), self.seed, self.expected_steps, watch)
        if self._search.running():
            return None
        records = self._search.records()
        if self._widen(records):
            return self.next_task()
        return self._next_fresh(records)

    def _next_fresh(self, records: Sequence[Trial]) -> Task | None:
        """A contender again with a seed that it has not met, to the target or four times the steps it took."""
        for contender, queue in self._race(records):
            rate, steps = contender["learning_rate"], contender["steps_to_target"]
            claim = queue.take([(rate, rate, self.seeds)])
            if claim is not None:
                plan = dataclasses.replace(self._at(claim), steps=math.ceil(MOST_STEPS_FACTOR * steps))
                return Task(claim, CONFIRM, plan, self._fresh_seed(claim.run), steps, _Alive(claim, math.inf))
            if queue.running():
                return None
        self.finished = True
        return None

    def _race(self, records: Sequence[Trial]) -> Iterator[tuple[Trial, TrialQueue]]:
        """The contenders to run with fresh seeds, at most four, each with its queue, as far as is known.

        The search's own steps are the luck of one seed, so a contender's are the fewest to hope for: the next one runs
        while the best median so far is more than a fifth above what it promises.
        """
        best = math.inf
        for contender in contenders(records)[:CONTENDERS]:
            if best <= LUCK * contender["steps_to_target"]:
                return
            queue = self._fresh(contender["learning_rate"])
            yield contender, queue
            steps = [math.inf if r["steps_to_target"] is None else r["steps_to_target"] for r in queue.records()]
            if len(steps) < self.seeds:
                return
            best = min(best, statistics.median(steps))

    def _fresh_seed(self, run: int) -> int:
        """Another at every batch size: a seed's luck would be much the same at all, and the fit would not see it."""
        return derive_seed(self.seed, "fresh", self.plan.batch_size, run) % 2**31

    def records(self) -> list[dict[str, Any]]:
        """All that ended, of the search and of the contenders."""
        searched = self._search.records()
        return searched + [record for _, queue in self._race(searched) for record in queue.records()]

    def counts(self) -> tuple[int, int]:
        """Trials that ended, and trials wanted as far as is known."""
        race = sum(1 for _ in self._race(self._search.records()))
        wanted = sum(count for _, _, count in self._ranges()) + self.seeds * max(1, race)
        return (wanted if self.finished else min(len(self.records()), wanted)), wanted

    def _fresh(self, rate: float) -> TrialQueue:
        if rate not in self._confirm:
            self._confirm[rate] = TrialQueue(self._storage, f"{self._name} {CONFIRM} {rate!r}")
        return self._confirm[rate]

    def _at(self, claim: Claim) -> Plan:
        return dataclasses.replace(self.plan, learning_rate=claim.learning_rate)

    def _ranges(self) -> list[tuple[float, float, int]]:
        centre = self.plan.learning_rate
        first = (centre / RATE_FACTOR, centre * RATE_FACTOR, self.trials)
        return [first, *((low, high, math.ceil(self.trials / 2)) for low, high in self._search.wider())]

    def _widen(self, records: Sequence[Trial]) -> bool:
        """Adds a range beyond the learning rates tried, where the best of them lies at their edge."""
        wider = self._search.wider()
        if len(wider) >= WIDENINGS or self.trials < FEWEST_TO_WIDEN:
            return False
        side = self._side(records)
        if side == 0:
            return False
        ranges = self._ranges()
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        self._search.widen([*wider, (high, high * RATE_FACTOR) if side > 0 else (low / RATE_FACTOR, low)])
        return True

    def _side(self, records: Sequence[Trial]) -> int:
        """Towards which side the best lies: by steps to target, else by metric; down if all diverged."""
        best = next(iter(contenders(records)), None)
        if best is None:
            sign = 1.0 if self.plan.target is None or self.plan.target.direction == "min" else -1.0
            ended = [r for r in records if isinstance(r["metric"], (int, float)) and math.isfinite(r["metric"])]
            best = min(ended, key=lambda record: sign * record["metric"], default=None)
        return -1 if best is None else at_edge(records, best["learning_rate"])


class _Alive:
    """A fixed limit, that shows life when asked."""

    def __init__(self, claim: Claim, most: float) -> None:
        self._claim, self._most = claim, most

    def __call__(self) -> float:
        self._claim.show_life()
        return self._most


class _Hopeless(_Alive):
    """Twice the fewest steps so far, of all workers; looked up at most once a second."""

    def __init__(self, queue: TrialQueue, claim: Claim) -> None:
        super().__init__(claim, HOPELESS_FACTOR * queue.fewest_steps())
        self._queue, self._looked = queue, time.monotonic()

    def __call__(self) -> float:
        if time.monotonic() - self._looked >= LOOK_EVERY_SECONDS:
            self._looked, self._most = time.monotonic(), HOPELESS_FACTOR * self._queue.fewest_steps()
        return super().__call__()
