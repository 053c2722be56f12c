"""The run folder as all ranks see it: the first rank writes, and a refused write is told to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from batchlab.core.checkpoint import drop_old, newest_whole, save_checkpoint
from batchlab.core.errors import BatchlabError, CheckpointError, InputError, StorageError
from batchlab.core.facts import Facts
from batchlab.core.files import replace_atomic
from batchlab.core.job import Job
from batchlab.core.jsonio import from_plain, to_plain
from batchlab.core.plan import Plan
from batchlab.core.provenance import git_commit, machine, versions
from batchlab.core.run import CHECKPOINTS, SCHEMA, STEPS_FILE, Run, summarize
from batchlab.core.store import RunWriter, reserved
from batchlab.parallel.torchrun import agree_max, is_main
from batchlab.spine.learner import Learner
from batchlab.spine.words import plural

WEIGHTS_FILE = "model.safetensors"
WRITE_FAILED = 255
_MAY_DIFFER_ON_RESUME = frozenset(  # what is said of a run, or looked at, or how and how long it is computed
    ("goal", "target", "predicted_steps", "predicted_step_seconds", "reasons", "frontier", "notes", "schema")
    + ("steps", "micro_batch", "accumulation", "world_size", "compile")
    + ("evaluation_batch", "evaluate_every", "checkpoint_every", "measure_noise")
)


class RunFolder:
    """What `train` writes. Every method is called on every rank; `failed` is non-zero where a write was refused.

    A refused write is remembered, not raised, until the ranks have agreed on it: then `give_up` raises on all.
    """

    def __init__(self, out: str | Path, meta: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(out)
        self._meta = meta
        self.failed = 0
        self._error: BatchlabError | None = None
        self._writer: RunWriter | None = None
        if is_main():
            try:
                self._writer = RunWriter(out, {} if resume else meta, resume=resume)
            except BatchlabError as error:
                self._error = error
        if agree_max(int(self._error is not None)):
            raise self._error or BatchlabError("the first rank could not open the run folder")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def restore(self, learner: Learner) -> str:
        """Brings the learner to the newest whole checkpoint and cuts off the lines after it; returns the status.

        With no checkpoint yet, the run starts again from the beginning. The status is "reached" where the run
        had met its target by then, else "running". `run.json` says how it goes on only once nothing refuses it.
        """
        state, problems = newest_whole(self.path / CHECKPOINTS)
        if state is None and problems:
            raise CheckpointError(f"no whole checkpoint is left: {problems[0]}")
        begun = Run.open(self.path)
        before = begun.plan if state is None else from_plain(Plan, state["plan"])
        _check_same(before, learner.plan)
        if state is not None:
            learner.load_state_dict(state["learner"])
            least = min(before.steps, -(-learner.position // learner.plan.batch_size))  # a batch may reach beyond
            if learner.plan.steps < least:
                raise InputError(
                    f"plan steps must be at least {least:,}, for the run has seen {learner.position:,} examples "
                    f"already, got {learner.plan.steps:,}"
                )
        elif begun.meta["seed"] != learner.seed:
            raise InputError(f"cannot resume with another seed: the run has {begun.meta['seed']}, got {learner.seed}")
        self._note_lacking(sum(line["step"] <= learner.step for line in begun.steps()), learner.step)
        self._write(lambda writer: writer.write_meta(**self._meta))
        self._write(lambda writer: writer.keep_steps(learner.step))
        self._agree()
        summary = summarize(Run.open(self.path).steps(), learner.plan, "running")
        return "running" if summary["target_step"] is None else "reached"

    def _note_lacking(self, lines: int, steps: int) -> None:
        notes = [note for note in self._meta["plan"]["notes"] if not note.startswith(f"{STEPS_FILE} lacks")]
        if lines < steps:
            said = f"{STEPS_FILE} lacks {steps - lines:,} of the {plural(steps, 'update')} before the checkpoint"
            notes.append(f"{said}: times, curves and what is reached leave them out")
        self._meta["plan"]["notes"] = notes

    def note_initial(self, values: dict[str, float]) -> None:
        """Records the evaluation before the first update."""
        self._write(lambda writer: writer.write_meta(initial=to_plain(values)))

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line to `steps.jsonl`."""
        self._write(lambda writer: writer.append_step(line))

    def save(self, learner: Learner) -> None:
        """Writes a checkpoint; when it returns, on any rank, the checkpoint is durable."""
        if is_main():
            state = {"plan": to_plain(learner.plan), "learner": learner.state_dict()}
            self._write(lambda writer: save_checkpoint(writer.checkpoints, learner.step, state))
            self._write(lambda writer: drop_old(writer.checkpoints))
        self._agree()

    def save_weights(self, learner: Learner) -> None:
        """Writes the weights that evaluation sees, the average where there is one, for use elsewhere."""
        from safetensors.torch import save_file

        def fill(file: Path) -> None:
            weights, tied = _each_once(learner.evaluated.state_dict())
            save_file(weights, file, metadata={"format": "pt"} | tied)

        self._write(lambda _: replace_atomic(self.path / WEIGHTS_FILE, fill))
        self._agree()

    def finish(self, status: str) -> None:
        """Writes what came of the run."""
        self._write(lambda writer: _finish(writer, status))
        self._agree()

    def fail(self, error: BaseException) -> None:
        """Writes that the run was ended by `error`, on this rank's own account: the others may not come to know."""
        self._write(lambda writer: _finish(writer, "stopped", error=f"{type(error).__name__}: {error}"))

    def give_up(self) -> None:
        """Ends the run on this rank after a write was refused; what was written before stays."""
        raise self._error or StorageError("the first rank could not write the run folder")

    def _agree(self) -> None:
        if agree_max(self.failed):
            self.give_up()

    def _write(self, action: Callable[[RunWriter], object]) -> None:
        if self._writer is None or self.failed:
            return
        try:
            action(self._writer)
        except StorageError as error:
            self.failed, self._error = WRITE_FAILED, error


@contextlib.contextmanager
def reserved_on_first_rank(folder: Path) -> Iterator[None]:
    """Holds `folder` for the run that this process is about to begin in it; all ranks end where it is another's."""
    with contextlib.ExitStack() as stack:
        error: BatchlabError | None = None
        if is_main():
            try:
                stack.enter_context(reserved(folder))
            except BatchlabError as refused:
                error = refused
        if agree_max(int(error is not None)):
            raise error or BatchlabError("the first rank could not open the run folder")
        yield


def _each_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by the first of their names, and the other names of those that have several, as safetensors has it.

    Unlike its `save_model` it takes what is part of a larger storage, as an LSTM's weights on a GPU are.
    """
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name in sorted(state):
        tensor = state[name]
        first = places.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if first == name or not tensor.numel():
            weights[name] = tensor.detach().cpu().contiguous()
        else:
            tied[name] = first
    return weights, tied


def _finish(writer: RunWriter, status: str, **more: str) -> None:
    run = writer.run()
    summary = summarize(run.steps(), run.plan, status)
    if status == "reached" and summary["target_step"] is None:
        summary |= {"target_step": 0, "target_seconds": 0.0, "final": run.meta["initial"]}
    writer.write_meta(status=status, summary=to_plain(summary), **more)


def describe(job: Job, plan: Plan, learner: Learner, *, seed: int, facts: Facts | None) -> dict[str, Any]:
    """What `run.json` says of a run that begins."""
    per_example = job.units_per_example
    meta: dict[str, Any] = {
        "schema": SCHEMA,
        "name": job.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": {
            "name": job.name,
            "unit": job.unit,
            "units_per_example": None if callable(per_example) else per_example,
            "optimizer": plan.optimizer,
            "train_examples": len(job.train),
            "valid_examples": len(job.valid),
            "parameters": sum(p.numel() for p in learner.model.parameters()),
        },
        "seed": seed,
        "git_commit": git_commit(),
    }
    return meta | describe_again(plan, learner) | ({} if facts is None else {"facts": to_plain(facts)})


def describe_again(plan: Plan, learner: Learner) -> dict[str, Any]:
    """What a resumed run says anew: how and where it goes on."""
    return {
        "status": "running",
        "plan": to_plain(plan),
        "device": str(learner.device),
        "world_size": learner.world,
        "versions": versions(),
        "machine": machine(),
        "summary": None,
        "error": None,
    }


def _check_same(before: Plan, now: Plan) -> None:
    """Refuses a plan by which another run would come, in any field but those that may differ."""
    was, is_ = to_plain(before), to_plain(now)
    other = [name for name in was if name not in _MAY_DIFFER_ON_RESUME and was[name] != is_[name]]
    if other:
        said = "; ".join(f"another {name}: the run has {was[name]!r}, the plan says {is_[name]!r}" for name in other)
        raise InputError(f"cannot resume with {said}")
