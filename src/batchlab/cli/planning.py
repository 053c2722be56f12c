"""The verbs that answer from rules alone, in milliseconds: nothing is trained and no job is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import arguments
from batchlab.cli.app import app
from batchlab.cli.console import output
from batchlab.cli.options import FileOut, Json


@app.command(epilog="Example: batchlab rescale recipe.toml --to 8192 --devices 64")
def rescale(
    recipe: Annotated[Path, typer.Argument(help="A training recipe, TOML.", metavar="RECIPE", show_default=False)],
    to: Annotated[
        int, typer.Option(help="The new batch size, over all devices, in the recipe's unit.", show_default=False)
    ],
    devices: Annotated[
        int | None, typer.Option(help="Devices of the new run.", show_default="as many examples on each as before")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Of the learning rate: none, sqrt, linear, surge, saturating, power.",
            show_default="the one that fits the optimizer",
        ),
    ] = None,
    exponent: Annotated[float | None, typer.Option(help="Of --rule power.", show_default=False)] = None,
    noise_scale: Annotated[
        float | None, typer.Option(help="Of the gradient, in the recipe's unit.", show_default="the recipe's own")
    ] = None,
    betas: Annotated[str, typer.Option(help="What moves with the batch: second, half_life, sde, keep.")] = "second",
    warmup: Annotated[str, typer.Option(help="What is kept of the warm-up: examples or updates.")] = "examples",
    out: FileOut = None,
    as_json: Json = False,
) -> None:
    """Move a whole RECIPE to another batch size: each number with its rule, and where the rules disagree."""
    with output(as_json) as out_:
        arguments.check_file(out)
        from batchlab.core.files import write_atomic
        from batchlab.planner import read_recipe
        from batchlab.planner import recipe as verb

        moved = verb(
            read_recipe(recipe),
            to,
            devices=devices,
            rule=rule,
            exponent=exponent,
            noise_scale=noise_scale,
            betas=betas,  # type: ignore[arg-type]
            warmup=warmup,  # type: ignore[arg-type]
        )
        if out is not None:
            write_atomic(out, moved.to_toml())
        shown = [moved.table(), *([f"Recipe: {out}"] if out else [])]
        out_.result(moved, *shown)


@app.command(epilog="Example: batchlab advise --params 7e9 --tokens 300e9 --optimizer adamw")
def advise(
    params: Annotated[float, typer.Option(help="Of the model, a plain count: 7e9.", show_default=False)],
    tokens: Annotated[float, typer.Option(help="Trained on in all, a plain count: 300e9.", show_default=False)],
    optimizer: Annotated[str, typer.Option(help="By torch's name, in small letters.")] = "adamw",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    batch_tokens: Annotated[
        float | None, typer.Option(help="The batch in mind, over all devices.", show_default="the one believed best")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="One that was tuned.", show_default=False)] = None,
    base_batch_tokens: Annotated[float | None, typer.Option(help="At this batch.", show_default=False)] = None,
    noise_scale_tokens: Annotated[
        float | None, typer.Option(help="As measured on the job.", show_default=False)
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="Nats a token that it is to reach.", show_default="what a law predicts")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Of DiLoCo.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Ask every published rule of a language model's run, side by side: batch, loss, learning rate, weight decay."""
    with output(as_json) as out_:
        from batchlab.planner import advise as verb

        told = verb(
            params=params,
            tokens=tokens,
            optimizer=optimizer,
            sequence_length=sequence_length,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            base_batch_tokens=base_batch_tokens,
            noise_scale_tokens=noise_scale_tokens,
            loss=loss,
            replicas=replicas,
        )
        out_.result(told, told.table())
