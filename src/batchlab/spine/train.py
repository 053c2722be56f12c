"""`train`: the one training loop. It runs a plan, writes a run folder, and resumes exactly."""

from __future__ import annotations

import dataclasses
import math
import operator
import shlex
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from batchlab.core.checks import is_whole
from batchlab.core.errors import InputError, Interrupted, NonFiniteError, StorageError
from batchlab.core.facts import Facts
from batchlab.core.job import Job
from batchlab.core.jsonio import to_plain
from batchlab.core.model import check_fresh
from batchlab.core.plan import OURS, Plan
from batchlab.core.random import preserved_generators
from batchlab.core.run import RUN_FILE, Run
from batchlab.core.store import check_folder
from batchlab.parallel.torchrun import agree_max
from batchlab.spine.batch_control import make_controller
from batchlab.spine.folder import WRITE_FAILED, RunFolder, describe, describe_again
from batchlab.spine.foreseen import foreseen, warm_up
from batchlab.spine.learner import Learner, Update
from batchlab.spine.signals import StopSignals

MAX_SKIPPED_IN_A_ROW = 5

StepCallback = Callable[[dict[str, Any]], None]


def train(
    job: Job,
    plan: Plan,
    *,
    out: str | Path,
    seed: int | None = None,
    resume: bool = False,
    callbacks: Iterable[StepCallback] = (),
    device: str | None = None,
    facts: Facts | None = None,
) -> Run:
    """Trains `job` as `plan` says and writes the folder `out`, until the target is met or the steps are done.

    seed: of the weights, the sample stream and all else that is random; None for 0, or with resume for the run's own.
    resume: go on from the newest whole
    checkpoint in `out`; micro-batch, world size, number of steps, target and evaluation may differ from before, and
    nothing that an update depends on. It goes on bit for bit where the model's kernels are deterministic, which on a
    GPU not all are (`torch.backends.cudnn.deterministic` for convolutions); on another device, to within rounding.
    callbacks: each is called on every rank with each line of `steps.jsonl`, a dict, after it was written.
    device: where to compute; the first GPU if there is one. facts: stored with the run, for its report.

    Under an initialised process group every rank calls it with the same arguments; the first rank writes, and all
    read checkpoints from the same folder. The batch is the plan's, whatever the number of ranks.

    A step whose loss or gradient is not finite changes nothing and is recorded; after 5 in a row the run stops with
    `NonFiniteError`. SIGINT and SIGTERM end it after the present step and a checkpoint, with `Interrupted`.
    Raises `InputError` for a job or plan that cannot run (nothing is written then), `RunLockedError` if another
    process is writing in `out`, `StorageError` if the disk refuses.
    """
    _check(job, plan, 0 if seed is None else seed)
    check_folder(out)
    plan = _as_run(_told(job, plan, Path(out) if resume else None))
    seed = _own_seed(Path(out), resume=resume) if seed is None else operator.index(seed)
    with preserved_generators(), StopSignals() as signals:
        learner = Learner(job, plan, seed=seed, device=device)
        try:
            if not resume:
                check_fresh(job)
            initial = {} if resume else _first_look(learner)
            meta = describe_again(plan, learner) if resume else describe(job, plan, learner, seed=seed, facts=facts)
            with RunFolder(out, meta, resume=resume) as folder:
                status = folder.restore(learner) if resume else "running"
                if learner.step == 0:
                    initial = initial or learner.evaluate()
                    folder.note_initial(initial)
                    status = _status(initial, plan)
                    if status == "reached":
                        folder.save(learner)
                try:
                    status = _run(learner, folder, signals, tuple(callbacks), status)
                except (Interrupted, StorageError):
                    raise
                except Exception as error:
                    folder.fail(error)
                    raise
                folder.save_weights(learner)
                folder.finish(status)
                _end_if_asked(signals)
        finally:
            learner.close()
    return Run.open(out)


def _run(
    learner: Learner, folder: RunFolder, signals: StopSignals, callbacks: Sequence[StepCallback], status: str
) -> str:
    """Update, evaluate when due, write the line, save when due; until the target, the last step, or a signal."""
    plan = learner.plan
    while learner.position < plan.examples and status == "running":
        last = learner.nearly_done
        evaluates = (learner.step + 1) % plan.evaluate_every == 0 or last
        update = learner.update(watch=evaluates)
        line = _line(update)
        if evaluates:
            line["valid"] = learner.evaluate()
            status = _status(line["valid"], plan)
        folder.append(line)
        for callback in callbacks:
            callback(to_plain(line))
        stop = agree_max(folder.failed or signals.requested)
        if stop == WRITE_FAILED:
            folder.give_up()
        hopeless = learner.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
        if stop or hopeless or last or status != "running" or update.step % plan.checkpoint_every == 0:
            folder.save(learner)
        if hopeless:
            raise _hopeless(update, folder)
        if stop and status == "running":
            folder.finish("interrupted")
            said = f"stopped by {signal.Signals(stop).name} after step {update.step}"
            raise Interrupted(f"{said}; go on with {_going_on(folder, learner)}", stop)
    return status if status != "running" else "not reached" if plan.target else "finished"


def _going_on(folder: RunFolder, learner: Learner) -> str:
    """How a run that was stopped is gone on with, in Python and on the command line."""
    seed = f" --seed {learner.seed}" if learner.seed else ""
    return f"train(..., resume=True), or batchlab train JOB --out {shlex.quote(str(folder.path))} --resume{seed}"


def _end_if_asked(signals: StopSignals) -> None:
    """A signal that came while the last of the run was written ends the caller all the same."""
    if stop := agree_max(signals.requested):
        raise Interrupted(f"stopped by {signal.Signals(stop).name} when the run had ended; all of it is saved", stop)


def _own_seed(out: Path, *, resume: bool) -> int:
    begun = resume and (out / RUN_FILE).is_file()
    return int(Run.open(out).meta["seed"]) if begun else 0


def _hopeless(update: Update, folder: RunFolder) -> NonFiniteError:
    return NonFiniteError(
        f"{MAX_SKIPPED_IN_A_ROW} updates in a row had a loss or gradient that is not finite, the last at step "
        f"{update.step} (loss {update.loss}, gradient norm {update.grad_norm}); nothing of them was applied. The "
        f"learning rate was {update.learning_rate:.4g}: take a lower one, in another folder than {folder.path}, for a "
        "run that is resumed keeps its rate"
    )


def _status(values: dict[str, float], plan: Plan) -> str:
    if plan.target is None:
        return "running"
    if plan.target.metric not in values:
        raise InputError(f"target metric {plan.target.metric!r} is not among the measured {sorted(values)}")
    return "reached" if plan.target.reached(values[plan.target.metric]) else "running"


def _line(update: Update) -> dict[str, Any]:
    noise = update.noise if update.noise is not None and update.noise.defined else None
    return {
        "step": update.step,
        "position": update.position,
        "batch_size": update.batch_size,
        "lr": update.learning_rate,
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "noise_scale": noise and {"value": noise.value, "low": noise.low, "high": noise.high},
        "seconds": update.seconds,
        "examples_per_second": update.batch_size / update.seconds,
        "skipped": update.skipped,
        **({"capped": True} if update.capped else {}),
        **({} if update.tensors is None else {"tensors": update.tensors}),
    }


def _check(job: Job, plan: Plan, seed: int) -> None:
    for name, value, noun in (("job", job, Job), ("plan", plan, Plan)):
        if not isinstance(value, noun):
            raise InputError(f"{name} must be a batchlab.{noun.__name__}, got {type(value).__name__}")
    if plan.job != job.name:
        raise InputError(f"the plan is for the job {plan.job!r}, this job is {job.name!r}")
    if plan.batch_size > len(job.train):
        raise InputError(f"plan batch_size {plan.batch_size} is larger than the data set of {len(job.train)} examples")
    world = _world()
    if plan.batch_size < world:
        raise InputError(f"plan batch_size {plan.batch_size} is smaller than the {world} ranks: each needs an example")
    if not is_whole(seed):
        raise InputError(f"seed must be an integer, got {seed!r}")


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _told(job: Job, plan: Plan, begun: Path | None) -> Plan:
    """The plan with what can be foreseen of it. begun: a run's folder, which had it with another length, maybe."""
    controller = make_controller(plan, len(job.train), _world())
    now, before = foreseen(plan, controller), warm_up(_as_planned(plan))
    if begun is not None and (begun / RUN_FILE).is_file():
        before += foreseen(dataclasses.replace(plan, steps=Run.open(begun).plan.steps), controller)
    kept = [note for note in plan.notes if note not in before and note not in now]
    return dataclasses.replace(plan, notes=(*kept, *now))


def _as_planned(plan: Plan) -> Plan:
    """With the length and the warm-up that others stand in place of."""
    reasons = {name: plan.reasons[name] for name in ("steps", "warmup_examples", "batch_size") if name in plan.reasons}
    planned = {name: why.inputs["in_place_of"] for name, why in reasons.items() if "in_place_of" in why.inputs}
    return dataclasses.replace(plan, reasons={}, **planned)


def _as_run(plan: Plan) -> Plan:
    """The plan for the ranks that there are: they may be others than it was made for, with the same batch."""
    world = _world()
    passes = math.ceil(math.ceil(plan.batch_size / world) / plan.micro_batch)
    if (world, passes) == (plan.world_size, plan.accumulation):
        return plan
    said = f"planned for {plan.world_size} devices with {plan.accumulation} passes, run on {world} with {passes}"
    run = plan.because("of the ranks that there are", OURS, world_size=world, accumulation=passes)
    run = run.because("not known for other ranks than were planned for", OURS, predicted_step_seconds=None)
    return dataclasses.replace(run, notes=(*plan.notes, f"{said}: the predicted time does not hold"))


def _first_look(learner: Learner) -> dict[str, float]:
    """Evaluates before the first update, and refuses, while nothing is written yet, what cannot be trained."""
    loss = learner.first_loss()
    if agree_max(int(not math.isfinite(loss))):
        raise InputError(
            f"job loss is {loss} on the first micro-batch, before any update: check the data and the model"
        )
    if agree_max(int(learner.lacks_variance())):
        size = learner.batch_size
        raise InputError(
            f"plan batch_size {size} leaves a pass of one example, whose batch normalisation has no variance: take a "
            "larger one"
        )
    values = learner.evaluate()
    _status(values, learner.plan)
    return values
