"""The command and its usage errors. Importing `planning`, `verbs` and `views` adds the verbs to `app`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from batchlab.cli.ending import BAD_INPUT, one_line, other_rank

UsageError: type[Exception] = typer.BadParameter.__mro__[2]  # Typer does not name the base of its usage errors

app = typer.Typer(
    name="batchlab",
    help="Which batch size, and what else must change with it? Measured on your model, for PyTorch.",
    epilog="Begin with: batchlab tune digits",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command() -> Any:
    """The whole command, all verbs in it."""
    from batchlab.cli import planning, verbs, views  # noqa: F401

    return typer.main.get_command(app)


def run(given: Sequence[str] | None = None) -> int:
    """Runs the verb that the arguments name; wrong usage is one line on stderr and 2."""
    arguments = list(sys.argv[1:] if given is None else given)
    try:
        code = command().main(args=arguments, prog_name="batchlab", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
        elif not other_rank():
            typer.echo(f"batchlab: error: {one_line(error.format_message().replace('Value error, ', ''))}", err=True)  # type: ignore[attr-defined]
        return BAD_INPUT
    except typer.Abort:
        raise KeyboardInterrupt from None


def _print_version(wanted: bool) -> None:
    if wanted:
        import batchlab

        typer.echo(batchlab.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""
