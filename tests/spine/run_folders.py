"""Run folders with known numbers, written without training, for the tests of reports."""

import json
import math
from pathlib import Path

import numpy as np

from batchlab.core.facts import Estimate, Facts, LearningRateTrial, MicroBatchTime, NoisePoint, Reference
from batchlab.core.job import Target
from batchlab.core.jsonio import to_plain
from batchlab.core.plan import FrontierRow, Plan, Reason
from batchlab.core.run import RUN_FILE, SCHEMA, STEPS_FILE, Run

VERSIONS = {"batchlab": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.1.0"}
MACHINE = {"system": "Linux x86_64", "processor": "a processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []}


def estimate(value, spread=1.4, method="micro-batch norms"):
    return Estimate(value, value / spread, value * spread, method)


def facts(name="digits", metric="accuracy", **changes):
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    settings = {
        "job": name,
        "unit": "example",
        "units_per_example": 1.0,
        "train_examples": 1437,
        "optimizer": "adamw",
        "device": "cpu",
        "machine": MACHINE,
        "noise_scale": estimate(96.0),
        "noise": tuple(NoisePoint(s, 32 * s, estimate(20.0 + s, 1.8)) for s in (10, 40, 80, 120)),
        "micro_batches": tuple(
            MicroBatchTime(n, estimate(4e-4 + 6e-5 * n, 1.08, "median of 5"), 2**20 * (3 + n // 8)) for n in sizes
        ),
        "max_micro_batch": 256,
        "update_seconds": estimate(8e-4, 1.1, "median of 5"),
        "base_batch_size": 32,
        "base_learning_rate": 3e-3,
        "learning_rate_trials": tuple(
            LearningRateTrial(10.0**e, math.inf if e > -1.2 else 0.2 + 0.5 * (e + 2.6) ** 2)
            for e in np.arange(-4.5, 0, 0.5)
        ),
        "reference": Reference(32, 3e-3, 160, 1.2, 150, ((10, 0.4), (150, 0.97))),
        "target": Target(metric, 0.97, "max"),
        "target_origin": "reference run",
        "notes": ("The target was set from the reference run: the job has none of its own.",),
    }
    return Facts(**(settings | changes))


def frontier_rows(picked=(96, 1), counts=(1, 2, 4)):
    rows = []
    for count in counts:
        for size in (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
            steps = 60 * (1 + 96 / size)
            seconds = steps * (1.2e-3 + 6e-5 * size / count)
            rows.append(FrontierRow(size, count, steps, seconds, count * seconds, (size, count) == picked))
    return tuple(rows)


def plan(name="digits", metric="accuracy", **changes):
    settings = {
        "job": name,
        "goal": "balanced",
        "batch_size": 96,
        "micro_batch": 32,
        "accumulation": 3,
        "world_size": 1,
        "steps": 300,
        "optimizer": "adamw",
        "learning_rate": 4.123e-3,
        "hyperparameters": {"betas": (0.9, 0.98), "weight_decay": 0.01},
        "predicted_steps": Estimate(120.0, 88.0, 171.0, "S_min (1 + B_crit/B)"),
        "predicted_step_seconds": 7e-3,
        "noise_scale": estimate(96.0),
        "warmup_examples": 480,
        "schedule": "cosine",
        "target": Target(metric, 0.97, "max"),
        "reasons": {
            "batch_size": Reason("knee of time against cost", "McCandlish et al. 2018", {"b_crit": 96.0}, 96),
            "micro_batch": Reason("fastest measured", "measured", {"max_micro_batch": 256}, 32),
            "learning_rate": Reason("surge", "Li et al. 2024", {"base": 3e-3, "noise_scale": 96.0}, 4.123e-3),
            "weight_decay": Reason("constant timescale", "Bergsma et al. 2025", {"timescale": 0.07}, 0.01),
        },
        "frontier": frontier_rows(),
        "notes": ("Times of several devices leave communication out.",),
    }
    return Plan(**(settings | changes))


def step_lines(count=138, metric="accuracy", batch_size=96, every=10, reached=None, skipped=(), seed=0):
    """`count` step lines: a falling loss, a rising metric and noise scale; those in `skipped` have a NaN loss."""
    random = np.random.default_rng(seed)
    lines = []
    for step in range(1, count + 1):
        noise = (12 + 100 * step / count) * math.exp(0.1 * random.standard_normal())
        bad = step in skipped
        line = {
            "step": step,
            "position": step * batch_size,
            "batch_size": batch_size,
            "lr": 4e-3,
            "loss": math.nan if bad else 2.3 * math.exp(-step / 40) + 0.05 + 0.03 * random.standard_exponential(),
            "grad_norm": math.inf if bad else 1.0,
            "noise_scale": None if bad or step < 3 else {"value": noise, "low": noise / 1.6, "high": noise * 1.7},
            "seconds": 7e-3,
            "examples_per_second": batch_size / 7e-3,
            "skipped": bad,
        }
        if step % every == 0 or step == count:
            good = reached is not None and step >= reached
            line["valid"] = {
                "loss": 2.2 * math.exp(-step / 45) + 0.1,
                metric: 0.975 if good else 0.1 + 0.8 * step / count,
            }
        lines.append(line)
    return lines


def write_run(folder, lines, *, plan=None, facts=None, summary=None, **meta):
    """Writes what `train` writes, and opens it."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    described = {
        "schema": SCHEMA,
        "name": plan.job,
        "created": "2026-11-24T12:00:00+00:00",
        "job": {"name": plan.job, "unit": "example", "units_per_example": 1, "optimizer": "adamw"},
        "seed": 0,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "status": summary["status"] if summary else "running",
        "plan": to_plain(plan),
        "device": "cpu",
        "world_size": 1,
        "versions": VERSIONS,
        "machine": MACHINE,
        "summary": summary,
        "initial": {"loss": 2.35, "accuracy": 0.1},
        **({} if facts is None else {"facts": to_plain(facts)}),
        **meta,
    }
    (folder / RUN_FILE).write_text(json.dumps(to_plain(described), allow_nan=False))
    (folder / STEPS_FILE).write_text("".join(json.dumps(to_plain(line), allow_nan=False) + "\n" for line in lines))
    return Run.open(folder)


def reached_run(folder, **changes):
    """A whole run of 138 steps that met its target, with facts."""
    from batchlab.core.run import summarize

    lines = step_lines(138, reached=131)
    made = plan(**changes)
    summary = summarize(iter(lines), made, "reached")
    return write_run(folder, lines, plan=made, facts=facts(), summary=summary)


def trials(sizes=(16, 32, 64, 128, 256), s_min=60.0, b_crit=80.0, metric_end=0.97):
    """Search and confirm trials whose best steps follow S_min (1 + B_crit/B) to within rounding."""
    for size in sizes:
        best = round(s_min * (1 + b_crit / size))
        rate = 1e-3 * size**0.5
        common = {"batch_size": size, "low_rate": rate / 8, "high_rate": rate * 8, "resolution": 5, "evaluations": []}
        for number, power in enumerate((-2, -1, 0, 1, 2, 3)):
            bad, steps = power == 3, round(best * 1.35 ** abs(power))
            yield common | {
                "id": f"{size}-search-{number}",
                "kind": "search",
                "number": number,
                "learning_rate": rate * 2.0**power,
                "seed": 0,
                "status": "diverged" if bad else "reached",
                "steps_to_target": None if bad else steps,
                "steps": steps,
                "examples": steps * size,
                "seconds": steps * (1e-3 + 5e-5 * size),
                "metric": math.nan if bad else metric_end,
            }
        for number, (seed, factor) in enumerate(((1, 0.95), (2, 1.0), (3, 1.08))):
            steps = round(best * factor)
            yield common | {
                "id": f"{size}-confirm-{number}",
                "kind": "confirm",
                "number": number,
                "learning_rate": rate,
                "seed": seed,
                "status": "reached",
                "steps_to_target": steps,
                "steps": steps,
                "examples": steps * size,
                "seconds": steps * (1e-3 + 5e-5 * size),
                "metric": metric_end,
            }


def write_study(folder, lines=None, *, finished=True, made_from=None, name="digits", metric="accuracy", notes=()):
    """Writes what `sweep` writes, and opens it."""
    from batchlab.core.study import SCHEMA as STUDY_SCHEMA
    from batchlab.core.study import STUDY_FILE, TRIALS_FILE, Study
    from batchlab.measure.runs.tradeoff import fit_tradeoff

    folder = Path(folder)
    folder.mkdir(parents=True)
    lines = list(trials() if lines is None else lines)
    (folder / TRIALS_FILE).write_text("".join(json.dumps(to_plain(line), allow_nan=False) + "\n" for line in lines))
    meta = {
        "schema": STUDY_SCHEMA,
        "name": name,
        "created": "2026-11-24T13:00:00+00:00",
        "status": "finished" if finished else "running",
        "job": {"name": name, "unit": "example"},
        "spec": {"batch_sizes": sorted({line["batch_size"] for line in lines}) or [16, 32]},
        "target": to_plain(Target(metric, 0.97, "max")),
        "seed": 0,
        "versions": VERSIONS,
        "machine": MACHINE,
        "summary": None,
        **({} if made_from is None else {"facts": to_plain(made_from)}),
    }
    if finished:
        rows = Study(folder, meta).rows()
        pairs = [(row["batch_size"], steps) for row in rows for steps in row["steps"]]
        fit = fit_tradeoff(*zip(*pairs, strict=True))
        meta["summary"] = {
            "status": "finished",
            "rows": rows,
            "seconds": 60.0,
            "tradeoff": to_plain(fit),
            "predicted": to_plain(estimate(96.0)),
            "ratio": fit.b_crit.value / 96.0,
            "notes": list(notes),
        }
    (folder / STUDY_FILE).write_text(json.dumps(to_plain(meta), allow_nan=False))
    return Study.open(folder)
