"""Real, small, complete jobs, on bundled data and on the user's files: each name is a function returning a `Job`."""

from batchlab.workloads.digits import digits as digits

__all__ = ["digits"]
