"""`findings`: noise, memory, curvature, energy or landscape of a job, at fresh weights or at those of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.checkpoint import newest_whole
from batchlab.core.checks import holds
from batchlab.core.device import pick_device
from batchlab.core.errors import CheckpointError, InputError
from batchlab.core.files import write_atomic
from batchlab.core.job import Job
from batchlab.core.model import least_examples, make_model
from batchlab.core.provenance import machine
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.core.run import CHECKPOINTS, Run
from batchlab.data.fetch import fetch, to_device
from batchlab.data.stream import SampleStream
from batchlab.measure.energy.energy import Energy
from batchlab.measure.findings import (
    FINDINGS_FILE,
    KINDS,
    EnergyFinding,
    Findings,
    LandscapeFinding,
    MemoryFinding,
    NoiseFinding,
)
from batchlab.measure.hessian.curvature import curvature
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.surface.landscape import landscape
from batchlab.measure.training_step import TrainingStep
from batchlab.spine.evaluate import scalar, units_of
from batchlab.spine.stopwatch import Progress, Stopwatch

BATCH, PIECES, FEWEST_STEPS, MOST_STEPS = 64, 8, 20, 2000
LANCZOS_STEPS, TRACE_PROBES, BATCH_REPEATS = 20, 3, 5
# Passes of the whole sample: Lanczos and trace on all of it, and batches of a fourth, a sixteenth and so on of it; a
# product with the Hessian takes some four times a gradient.
CURVATURE_PASSES = 4 * LANCZOS_STEPS * ((1 + TRACE_PROBES) + BATCH_REPEATS / 3)
DIRECTIONS, POINTS, LEVEL_SHARE = 6, 21, 0.1
LEAST_SAMPLE, MOST_SAMPLE, PART = 32, 2048, 128
IDLE_SHARE, READINGS = 0.2, 50


def findings(
    job: Job,
    only: Sequence[str],
    *,
    at: Run | None = None,
    budget: float = 20.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Measures each of `only`: "noise", "memory", "curvature", "energy", "landscape", in about `budget` seconds in all.

    at: a run of this job, whose newest checkpoint gives the weights; by default they are fresh. Memory and energy are
    those of training steps and do not depend on it. Curvature and landscape take as many examples, of the training
    and of the validation data, as their share of the budget allows; `notes` says how many.

    The caller's random generators are kept. In one process: ranks would measure the same thing.
    Raises `InputError` for a kind that there is none of, or whose extra is not installed.
    """
    if not isinstance(job, Job):
        raise InputError(f"job must be a batchlab.Job, got {type(job).__name__}")
    wanted = [only] if isinstance(only, str) else list(dict.fromkeys(only))
    if not wanted or any(kind not in KINDS for kind in wanted):
        raise InputError(f"only must name some of {', '.join(KINDS)}, got {only!r}")
    if not holds(lambda value: 0 < value < math.inf, budget):
        raise InputError(f"budget must be finite and > 0 seconds, got {budget!r}")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError("single facts are measured in one process: run probe with only= without torchrun")
    where, watch = pick_device(device), Stopwatch(budget, progress)
    with preserved_generators():
        model, weights = _model(job, at, seed, where)
        work = _Work(job, model, where, seed, budget / len(wanted), [])
        found = {}
        for done, kind in enumerate(wanted):
            watch.report(kind, done / len(wanted))
            found[kind] = getattr(work, kind)()
        watch.report(wanted[-1], 1.0)
    return Findings(job.name, str(where), machine(), weights, seed, notes=tuple(work.notes), **found)


def keep(run: Run, found: Findings) -> None:
    """Writes findings into the run's folder, where `report` shows them, over those of the same kind that it has."""
    file = run.path / FINDINGS_FILE
    older = found_in(run)
    write_atomic(file, (found if older is None else found.over(older)).to_json())


def found_in(run: Run) -> Findings | None:
    """The findings that a run's folder holds."""
    file = run.path / FINDINGS_FILE
    return Findings.from_json(file.read_bytes(), source=str(file)) if file.is_file() else None


def _model(job: Job, at: Run | None, seed: int, device: torch.device) -> tuple[nn.Module, str]:
    """The job's module with the weights asked for, and where they came from."""
    reseed(derive_seed(seed, "weights"))
    model = make_model(job).to(device).train()
    if at is None:
        return model, f"fresh, seed {seed}"
    if at.plan.job != job.name:
        raise InputError(f"{at.path} is a run of the job {at.plan.job!r}, not of {job.name!r}")
    state, problems = newest_whole(at.path / CHECKPOINTS)
    if state is None:
        raise CheckpointError(f"{at.path} has no whole checkpoint{f': {problems[0]}' if problems else ''}")
    try:
        model.load_state_dict(state["learner"]["model"])
    except RuntimeError as error:
        raise InputError(f"{at.path} holds weights of another model than the job's: {error}") from None
    return model, f"{at.name} after {state['learner']['step']:,} updates"


@dataclasses.dataclass
class _Work:
    """One method for each kind; `seconds` is what each may take."""

    job: Job
    model: nn.Module
    device: torch.device
    seed: int
    seconds: float
    notes: list[str]

    def noise(self) -> NoiseFinding:
        """The noise scale of batches at these weights, none of which changes them."""
        batch = min(BATCH, len(self.job.train))
        stream = SampleStream(len(self.job.train), derive_seed(self.seed, "noise"))
        noise, deadline, steps = GradientNoise(self.model, ema=None), time.perf_counter() + self.seconds, 0
        pieces, buffers = max(1, min(PIECES, batch // least_examples(self.model))), list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        self.model.train()
        try:
            while steps < MOST_STEPS and (steps < FEWEST_STEPS or time.perf_counter() < deadline):
                self.model.zero_grad(set_to_none=True)
                parts = torch.as_tensor(stream.indices(steps * batch, batch)).tensor_split(pieces)
                batches = [self._batch(self.job.train, part.tolist()) for part in parts]
                units = [units_of(self.job, each, len(part)) for each, part in zip(batches, parts, strict=True)]
                told = [place for place, count in enumerate(units) if count] or [0]  # a mean over nothing is NaN
                for place in told:
                    with noise.micro_batch(len(parts[place])):
                        share = units[place] / max(sum(units), 1)
                        (scalar(self.job.loss(self.model, batches[place])) * share).backward()  # type: ignore[no-untyped-call]
                estimate, steps = noise.step(), steps + 1
        finally:
            noise.close()
            self.model.zero_grad(set_to_none=True)
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
        trace, grad_sq = noise.statistics.means
        return NoiseFinding(estimate, trace, grad_sq, batch, steps)

    def memory(self) -> MemoryFinding:
        """The largest micro-batch, as `probe` finds it."""
        found = find_micro_batch(self.job, device=self.device, seconds=self.seconds, seed=self.seed)
        tries = [(t.size, t.fits, t.phase or "", -1 if t.peak_bytes is None else t.peak_bytes) for t in found.tries]
        return MemoryFinding(found.size, found.why, tuple(tries))

    def curvature(self) -> Any:
        """Of a sample of the training data, as large as the time allows."""
        per_example = self._seconds_per_example()
        count = self._sample("curvature", len(self.job.train), self.seconds / (CURVATURE_PASSES * per_example))
        stream = SampleStream(len(self.job.train), derive_seed(self.seed, "curvature"))
        batches = self._parts(self.job.train, torch.as_tensor(stream.indices(0, count)).tolist())
        return curvature(
            self.model,
            self.job.loss,
            batches,
            steps=LANCZOS_STEPS,
            probes=TRACE_PROBES,
            repeats=BATCH_REPEATS,
            count=self._count(),
            seed=self.seed,
        )

    def energy(self) -> EnergyFinding:
        """Of training steps at a batch size of 64."""
        step = TrainingStep(self.job, device=self.device, seed=self.seed)
        size, steps = min(BATCH, len(self.job.train)), 0
        step(size)
        step.wait()
        idle, interval = IDLE_SHARE * self.seconds, max(0.05, self.seconds / READINGS)
        with Energy(idle_seconds=idle, interval=interval) as energy:
            deadline = time.perf_counter() + self.seconds - idle
            while steps < FEWEST_STEPS or time.perf_counter() < deadline:
                step(size)
                step.wait()
                steps += 1
        return EnergyFinding(energy.use, steps, size)

    def landscape(self) -> LandscapeFinding:
        """Along random directions, on a sample of the validation data."""
        passes = (POINTS - 1) * DIRECTIONS + 1
        allowed = self.seconds / (passes * self._seconds_per_example())
        indices = list(range(self._sample("landscape", len(self.job.valid), allowed)))
        batches = self._parts(self.job.valid, indices)
        found = landscape(
            self.model,
            self.job.loss,
            batches,
            points=POINTS,
            directions=DIRECTIONS,
            count=self._count(),
            seed=self.seed,
        )
        level = LEVEL_SHARE * abs(found.origin) or LEVEL_SHARE
        return LandscapeFinding(found, level, found.width(level))

    def _count(self) -> Callable[[Any], int] | None:
        """What a batch's loss is the mean over, where that is not its examples."""
        units = self.job.units_per_example
        return units if callable(units) else None

    def _sample(self, what: str, whole: int, affordable: float) -> int:
        """How many examples to take, noted where they are not all."""
        count = min(whole, MOST_SAMPLE, max(LEAST_SAMPLE, int(affordable)))
        if count < whole:
            self.notes.append(f"{what}: {count:,} of {whole:,} examples, for time")
        return count

    def _parts(self, data: Any, indices: list[int]) -> list[Any]:
        return [self._batch(data, indices[at : at + PART]) for at in range(0, len(indices), PART)]

    def _batch(self, data: Any, indices: list[int]) -> Any:
        return to_device(fetch(data, indices, self.job.collate), self.device)

    def _seconds_per_example(self) -> float:
        """Of a forward and backward pass, the faster of two."""
        step = TrainingStep(self.job, device=self.device, seed=self.seed)
        size, best = min(PART, len(self.job.train)), 0.0
        for repeat in range(3):
            started = time.perf_counter()
            step.forward_backward(size)
            step.wait()
            took = time.perf_counter() - started
            best = took if repeat == 1 or took < best else best
        return max(best, 1e-9) / size
