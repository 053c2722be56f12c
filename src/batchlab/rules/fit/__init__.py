"""Laws fitted to a user's own runs: constants with intervals, errors on what was left out, and plain refusals."""

from batchlab.rules.fit.bowl import Optimum, batch_optimum, learning_rate_optimum, optimum, timescale_optimum
from batchlab.rules.fit.chinchilla_law import ChinchillaLaw, chinchilla, chinchilla_constants
from batchlab.rules.fit.power_laws import PowerLaw, power_law
from batchlab.rules.fit.reading import from_study, read_runs
from batchlab.rules.fit.table import RunTable

__all__ = [
    "ChinchillaLaw",
    "Optimum",
    "PowerLaw",
    "RunTable",
    "batch_optimum",
    "chinchilla",
    "chinchilla_constants",
    "from_study",
    "learning_rate_optimum",
    "optimum",
    "power_law",
    "read_runs",
    "timescale_optimum",
]
