"""Claim: none beforehand. A ranking of optimizers by batch size, each tuned alike, with what did not work in it.

Cells of job x batch x budget. In a cell every optimizer sees the same examples in the same order and has as many Optuna
trials (TPE, of the learning rate alone, over a factor of 1,000 about a usual one), judged by the loss of one seed; the
best rate runs again with fresh seeds. Final and not best losses count, of the weights as they are; a run whose loss is
not finite counts as infinite and is not dropped. Other settings are those of `batchlab.optim.create`; a warm-up of a
tenth, then a cosine to 0. "steps to the target": the median over seeds of the updates after which the validation loss,
looked at 40 times, was at the target first. State: numbers a parameter. step_ms: of a step alone.
"""

import argparse
import dataclasses
import math
import statistics
import time
from typing import Any

import optuna
import torch
from _paired import report, result, write

import batchlab as bl
from batchlab.core.plan import Plan
from batchlab.optim.by_name import create, step_alone
from batchlab.spine.learner import Learner
from batchlab.workloads import autoencoder, diabetes, digits

JOBS = {"digits": (digits, 15, 0.12), "diabetes": (diabetes, 20, 0.6), "autoencoder": (autoencoder, 15, None)}
USUAL = {
    **{"sgd": 0.1, "vrsgd": 0.1, "lars": 10.0, "vrlars": 10.0, "adagrad_norm": 1.0, "small_fc_lopt": 1.0},
    **{"lamb": 0.01, "vrlamb": 0.01, "lion": 3e-4, "signum": 3e-4, "muon": 3e-3, "dmuon": 3e-3},
}
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb", "lion", "signum", "ademamix", "mars", "muon", "came", "vrsgd", "vrlamb")
RANGE, LOOKS, WARMUP = 1000**0.5, 40, 0.1


@dataclasses.dataclass(frozen=True)
class Cell:
    """batch, examples: of a run."""

    job: bl.Job
    batch: int
    examples: int
    target: float | None

    def plan(self, optimizer: str, rate: float) -> Plan:
        """One run of the cell."""
        steps = max(1, self.examples // self.batch)
        settings = {"alpha_warmup": steps, "beta3_warmup": steps} if optimizer == "ademamix" else {}
        return Plan(
            job=self.job.name,
            goal="balanced",
            batch_size=self.batch,
            micro_batch=self.batch,
            accumulation=1,
            world_size=1,
            steps=steps,
            optimizer=optimizer,
            learning_rate=rate,
            hyperparameters=settings,
            warmup_examples=round(WARMUP * steps) * self.batch,
            schedule="cosine",
            measure_noise=False,
        )


def trained(cell: Cell, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """loss: the last one, infinite where training diverged. steps: to the target, None if it was never there."""
    job = dataclasses.replace(cell.job, optimizer=optimizer)
    plan = cell.plan(optimizer, rate)
    learner = Learner(job, plan, seed=seed, device="cpu")
    every, reached, loss = max(1, plan.steps // LOOKS), None, math.inf
    for step in range(1, plan.steps + 1):
        if learner.update().skipped:
            return {"loss": math.inf, "steps": None, "diverged": True}
        if step % every == 0 or step == plan.steps:
            loss = learner.evaluate()["loss"]
            if reached is None and cell.target is not None and loss <= cell.target:
                reached = step
    return {"loss": loss if math.isfinite(loss) else math.inf, "steps": reached, "diverged": not math.isfinite(loss)}


def tuned(cell: Cell, optimizer: str, trials: int) -> dict[str, Any]:
    """The best rate, whether it lies near an end of the range, and how many trials diverged."""
    usual = USUAL.get(optimizer, 3e-3)
    low, high = usual / RANGE, usual * RANGE
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(2, trials // 2)))

    def objective(trial: optuna.Trial) -> float:
        found = trained(cell, optimizer, trial.suggest_float("lr", low, high, log=True), seed=0)
        return min(found["loss"], 1e12)

    study.enqueue_trial({"lr": usual})
    study.optimize(objective, n_trials=trials)
    rate = study.best_params["lr"]
    diverged = sum(trial.value is not None and trial.value >= 1e12 for trial in study.trials)
    return {"rate": rate, "edge": not 2 * low < rate < high / 2, "trials": trials, "trials_diverged": diverged}


def cost(job: bl.Job, optimizer: str, seconds: float = 0.3) -> dict[str, float]:
    """Numbers of state a parameter, and milliseconds of a step alone."""
    torch.manual_seed(0)
    model = job.model()
    made = create(optimizer, model, lr=0.0)
    trained_ = [p for p in model.parameters() if p.requires_grad]
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        for p in trained_:
            p.grad = torch.full_like(p, 1e-3)
        start = time.perf_counter()
        step_alone(made)
        times.append(time.perf_counter() - start)
    held = sum(
        v.numel() for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim
    )
    return {"state": held / sum(p.numel() for p in trained_), "step_ms": 1000 * statistics.median(times)}


def row(cell: Cell, optimizer: str, given: argparse.Namespace) -> dict[str, Any]:
    """One optimizer in one cell."""
    found = tuned(cell, optimizer, given.trials)
    runs = [trained(cell, optimizer, found["rate"], 1000 + seed) for seed in range(given.seeds)]
    losses = [run["loss"] for run in runs]
    there = [run["steps"] for run in runs]
    steps = statistics.median(step if step is not None else math.inf for step in there) if cell.target else None
    told = {"job": cell.job.name, "batch_size": cell.batch, "examples": cell.examples, "optimizer": optimizer} | found
    told |= {"losses": losses, "mean_loss": statistics.fmean(losses), "diverged": sum(run["diverged"] for run in runs)}
    told["spread"] = statistics.stdev(losses) if given.seeds > 1 and all(map(math.isfinite, losses)) else None
    return told | {"target": cell.target, "seed_steps": there, "steps_to_target": steps} | cost(cell.job, optimizer)


def main() -> None:
    """Prints each cell's ranking, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="*", default=["digits", "diabetes"], choices=list(JOBS))
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 256])
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each run; by default the job's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/optimizers.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    claim, rows = " ".join((__doc__ or "").split("\n\n")[0].split()), []
    for name in given.jobs:
        make, epochs, target = JOBS[name]
        job = make()
        for batch in given.batches:
            cell = Cell(job, batch, (given.epochs or epochs) * len(job.train), target)
            mine = [row(cell, optimizer, given) for optimizer in given.optimizers]
            rows += sorted(mine, key=lambda each: each["mean_loss"])
            for each in rows[-len(mine) :]:
                shown = ("optimizer", "rate", "edge", "mean_loss", "spread", "diverged", "steps_to_target", "step_ms")
                said = {key: f"{v:.4g}" if isinstance(v := each[key], float) else v for key in shown}
                print(name, batch, said, flush=True)
            if given.save:
                write(result("optimizers", claim, rows))
    report("optimizers", claim, rows, save=given.save)


if __name__ == "__main__":
    main()
