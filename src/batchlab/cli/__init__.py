"""The command line: a thin shell over the Python verbs, which bear the same names and defaults.

Results go to stdout, all else to stderr. Exit codes: 0; 2 for bad usage or input, with one line and nothing written;
1 for a failure; 130 and 143 for SIGINT and SIGTERM. This module imports nothing heavy, so that signals and wrong
usage are answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.cli.ending import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, `sys.argv[1:]` by default; returns the exit code, and ends the process on a signal."""
    return exit_code(lambda: _command_line(arguments))


def _command_line(arguments: Sequence[str] | None) -> int:
    from batchlab.cli.app import run

    return run(arguments)
