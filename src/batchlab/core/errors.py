"""What batchlab raises. A caller who wants to catch any of it catches `BatchlabError`."""

from __future__ import annotations


class BatchlabError(Exception):
    """Something batchlab foresaw went wrong: its message is one line and says what to do."""


class InputError(BatchlabError, ValueError):
    """The caller gave something unusable: the message names it, its value and what would be right.

    The command line answers it with exit code 2 and writes nothing.
    """


class NonFiniteError(BatchlabError):
    """Too many steps in a row had a loss or gradient that is NaN or infinite."""


class CheckpointError(BatchlabError):
    """A checkpoint is damaged, of another job, or from a newer batchlab."""


class RunLockedError(BatchlabError):
    """Another process is writing in this run folder."""


class StorageError(BatchlabError):
    """The disk refused a write; all that was written before is intact."""


class Interrupted(BatchlabError):
    """A signal asked the run to stop; the state was saved first.

    signum: the signal, 2 for SIGINT or 15 for SIGTERM. The command line exits with 128 + signum.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
