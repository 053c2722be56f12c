"""The options that several verbs share, each written once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


class Goal(StrEnum):
    """What a plan is best at."""

    TIME = "time"
    COST = "cost"
    BALANCED = "balanced"


class BatchSchedule(StrEnum):
    """Whether the batch stays, or what moves it; a ramp and milestones need settings."""

    FIXED = "fixed"
    ADAPTIVE = "adaptive"
    GOODPUT = "goodput"
    DECAY_BY_BATCH = "decay_by_batch"
    NORM_TEST = "norm_test"
    INNER_PRODUCT_TEST = "inner_product_test"
    RAMP = "ramp"
    MILESTONES = "milestones"


class Schedule(StrEnum):
    """What the learning rate does after its warm-up, if any."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"
    ONE_CYCLE = "one_cycle"
    POWER = "power"


class Precision(StrEnum):
    """What is computed in."""

    FLOAT32 = "float32"
    BF16 = "bf16"


JobSpec: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="digits, pystdlib, diabetes, syntax, autoencoder, text:PATH, images:FOLDER, table:FILE.csv, or "
        "FILE.py:NAME of a Job of yours.",
        show_default=False,
    ),
]
Column: TypeAlias = Annotated[
    str | None,
    typer.Option("--target", metavar="COLUMN", help="For table jobs: the column to predict.", show_default=False),
]
AtLeast: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="METRIC=VALUE", help="Trained when METRIC is at least VALUE.", show_default=False),
]
AtMost: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="METRIC=VALUE", help="Trained when METRIC is at most VALUE.", show_default=False),
]
GoalOption: TypeAlias = Annotated[Goal, typer.Option("--goal", help="What the batch size is chosen for.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Of weights, sample order and all else that is random.")]
RunSeed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Of weights, sample order and all else that is random.", show_default="0; with --resume, the run's own"
    ),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="Where to compute, as torch names it.", show_default="the first GPU, else the CPU")
]
MaxSteps: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="The most updates to train.", show_default="as planned")
]
RunOut: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="The run's folder.", show_default="runs/JOB-TIME", metavar="DIR")
]
FileOut: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="Also write it to this file.", show_default=False, metavar="FILE")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one line of JSON in place of tables.")]
Params: TypeAlias = Annotated[float, typer.Option(help="Of the model, a plain count: 7e9.", show_default=False)]
Tokens: TypeAlias = Annotated[float, typer.Option(help="Trained on in all, a plain count: 300e9.", show_default=False)]
SequenceLength: TypeAlias = Annotated[int, typer.Option(help="Tokens of a sequence.")]
DeviceName: TypeAlias = Annotated[str, typer.Option(help="An accelerator, as H100-80.", show_default=False)]
Hardware: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Accelerators and prices of your own, TOML.", show_default="the packaged table"),
]
