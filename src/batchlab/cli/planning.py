"""The verbs that answer from rules alone, in milliseconds: nothing is trained and no job is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import arguments
from batchlab.cli.app import app
from batchlab.cli.console import output
from batchlab.cli.options import DeviceName, FileOut, Hardware, Json, Params, SequenceLength, Tokens
from batchlab.core.errors import InputError
from batchlab.rules.fit.law_names import SAYS as LAWS


@app.command(epilog="Example: batchlab rescale recipe.toml --to 8192 --devices 64")
def rescale(
    recipe: Annotated[
        Path, typer.Argument(help="A training recipe, TOML; JSON in *.json.", metavar="RECIPE", show_default=False)
    ],
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
    """Move a whole RECIPE to another batch size: each number with its rule, and where the rules disagree.

    A recipe is a flat file such as

    batch_size = 256
    optimizer = "adamw"
    learning_rate = 3e-4
    steps = 1000

    The first three are needed, and one of steps, epochs, total_examples.
    It may also hold one of warmup_steps, warmup_epochs, warmup_share,
    warmup_examples, and any of train_examples, devices, micro_batch,
    momentum, betas, alpha, eps, weight_decay, schedule, clip_norm,
    ema_decay, ema_every, ghost_batch_size, batchnorm_momentum,
    noise_scale. With unit = "tokens" names in _examples end in _tokens.
    """
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
    params: Params,
    tokens: Tokens,
    optimizer: Annotated[str, typer.Option(help="By torch's name, in small letters.")] = "adamw",
    sequence_length: SequenceLength = 2048,
    batch_tokens: Annotated[
        float | None, typer.Option(help="The batch in mind, over all devices.", show_default="the one believed best")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="One that was tuned; needs --base-batch-tokens.", show_default=False)
    ] = None,
    base_batch_tokens: Annotated[
        float | None, typer.Option(help="The batch that --learning-rate was tuned at, in tokens.", show_default=False)
    ] = None,
    noise_scale_tokens: Annotated[
        float | None, typer.Option(help="As measured on the job.", show_default=False)
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="Nats a token that it is to reach.", show_default="what a law predicts")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Train by DiLoCo with so many replicas.", show_default="data-parallel")
    ] = None,
    non_embedding_params: Annotated[
        float | None, typer.Option(help="Parameters without embeddings, for two laws of the loss.", show_default=False)
    ] = None,
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
            non_embedding_params=non_embedding_params,
        )
        out_.result(told, told.table())


@app.command(epilog="Example: batchlab layout config.json --device H100-80 --devices 64 --batch 1024")
def layout(
    config: Annotated[
        Path,
        typer.Argument(help="A model's config.json, in Hugging Face's form.", metavar="CONFIG", show_default=False),
    ],
    device: DeviceName,
    devices: Annotated[int, typer.Option(help="How many of them.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Sequences of an update, over all devices.", show_default=False)],
    sequence_length: SequenceLength = 2048,
    precision: Annotated[
        str, typer.Option(help="bf16, bf16-float32-gradients, autocast or float32 (memory only), with Adam.")
    ] = "bf16",
    keep: Annotated[int, typer.Option(help="Layouts to show.")] = 10,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Rank every way of spreading a model's training over devices: memory, time, and why the others lost."""
    with output(as_json) as out_:
        from batchlab.planner import Cluster, ModelShape
        from batchlab.planner import layout as verb

        fields = arguments.json_object(config, "model config")
        try:
            shape = ModelShape.from_config(fields)
        except InputError as error:
            raise InputError(f"{config}: {error}") from None
        found = verb(
            shape,
            Cluster(devices, arguments.accelerator(device, hardware)),
            global_batch=batch,
            sequence_length=sequence_length,
            precision=precision,
            keep=keep,
        )
        head = f"{shape.parameters / 1e9:.3g}B parameters; {batch * sequence_length:,} tokens an update"
        out_.result(found, head, "", found.table(), *(f"! {note}" for note in found.notes))


@app.command(
    epilog="Example: batchlab cost --params 1e9 --tokens 20e9 --device A100-80 --devices 8,64 --batch 256..2048"
)
def cost(
    params: Params,
    tokens: Tokens,
    device: Annotated[str, typer.Option(help="Accelerators, as A100-80,H100-80.", show_default=False)],
    batch: Annotated[str, typer.Option(help="Sequences of an update, as 256,512 or 256..2048.", show_default=False)],
    devices: Annotated[str, typer.Option(help="How many of them, as 8,64 or 8..64.")] = "1",
    strategy: Annotated[str, typer.Option(help="Of ddp, grad_optimizer, full; several as ddp,full.")] = "ddp",
    mfu: Annotated[float, typer.Option(help="The share of the peak that passes reach; measure yours.")] = 0.4,
    sequence_length: SequenceLength = 2048,
    micro_batch: Annotated[
        int | None, typer.Option(help="The most sequences of a pass.", show_default="a device's whole share")
    ] = None,
    activation_bytes: Annotated[
        float | None,
        typer.Option(help="What a sequence keeps for the backward pass in all layers.", show_default="not counted"),
    ] = None,
    overlap: Annotated[float, typer.Option(help="The share of communication hidden behind passes.")] = 0.0,
    price: Annotated[
        float | None, typer.Option(help="USD for one device an hour.", show_default="the table's, with its date")
    ] = None,
    g_per_kwh: Annotated[
        float | None, typer.Option(help="Grams of CO2e of a kWh of your grid.", show_default=False)
    ] = None,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Price a training run on each machine, number of devices and batch: time, dollars, kWh."""
    with output(as_json) as out_:
        from batchlab.core.batch_sizes import parse_batch_sizes
        from batchlab.planner import Training, cost_table

        kinds = [arguments.accelerator(name.strip(), hardware) for name in device.split(",")]
        table = cost_table(
            Training(params, tokens, sequence_length, activation_bytes=activation_bytes),
            batches=parse_batch_sizes(batch),
            devices=kinds,
            counts=parse_batch_sizes(devices),
            strategies=[name.strip() for name in strategy.split(",")],
            mfu=mfu,
            micro_batch=micro_batch,
            overlap=overlap,
            prices=None if price is None else {kind.name: price for kind in kinds},
            g_per_kwh=g_per_kwh,
        )
        notes = dict.fromkeys(note for row in table.rows for note in row.notes)
        out_.result(table, table.table(), *(f"! {note}" for note in notes))


@app.command(epilog="Example: batchlab fit runs.csv --law power_law --set x=tokens --set y=batch_tokens")
def fit(
    runs: Annotated[
        Path,
        typer.Argument(
            help="A CSV of runs, a study, or a folder of runs. A CSV's columns carry the unit: params and tokens, or "
            "params_millions, tokens_billions and the like; batch_tokens, or batch_sequences with sequence_length, or "
            "batch_examples; steps; steps_to_target, blank where not reached; learning_rate; learning_rate_at_edge; "
            "weight_decay; loss, in nats a token; replicas; run; optimizer.",
            metavar="RUNS",
            show_default=False,
        ),
    ],
    law: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(LAWS)}.", show_default="all that the runs can tell")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the law; may be repeated.", show_default=False),
    ] = None,
    drop_diverged: Annotated[
        bool, typer.Option("--drop-diverged", help="Leave out rows whose loss is not finite.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit laws to your own RUNS: constants with intervals, and how far off the law is where a run was left out."""
    with output(as_json) as out_:
        from batchlab.rules.fit import fit as verb
        from batchlab.rules.fit import fit_laws, read_runs

        table = read_runs(runs, diverged="drop" if drop_diverged else "refuse")
        if law is not None:
            found = verb(table, law, **arguments.named_values(set_ or []))
            out_.result(found, found.table())
            return
        if set_:
            raise InputError("--set is for one law: name it with --law")
        fits, refused = {}, {}
        for name in fit_laws():
            try:
                fits[name] = verb(table, name)
            except InputError as error:
                refused[name] = str(error)
        if not fits:
            raise InputError(f"these runs tell no law; --law NAME says why not: {', '.join(refused)}")
        said = [text for each in fits.values() for text in (each.table(), "")]
        out_.result(
            {"fits": fits, "refused": refused}, *said, *(f"not fitted: {name}: {why}" for name, why in refused.items())
        )
