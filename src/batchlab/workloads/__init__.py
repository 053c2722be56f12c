"""Real, small, complete jobs, on bundled data and on the user's files: each name is a function returning a `Job`."""

from batchlab.workloads.autoencoder import autoencoder as autoencoder
from batchlab.workloads.diabetes import diabetes as diabetes
from batchlab.workloads.digits import digits as digits
from batchlab.workloads.images import images as images
from batchlab.workloads.pystdlib import pystdlib as pystdlib
from batchlab.workloads.syntax import syntax as syntax
from batchlab.workloads.table import table as table
from batchlab.workloads.text import text as text

__all__ = ["digits", "pystdlib", "diabetes", "syntax", "autoencoder", "text", "images", "table"]
