"""Laws fitted to a user's own runs: constants with intervals, errors on what was left out, and plain refusals.

`fit(table, law)` fits any of them by name and gives one kind of result; each law's own function says more. Names are
imported when they are first used. No module here bears the name of something that it exports.
"""

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.rules.fit.bowl import Optimum as Optimum
    from batchlab.rules.fit.bowl import batch_optimum as batch_optimum
    from batchlab.rules.fit.bowl import learning_rate_optimum as learning_rate_optimum
    from batchlab.rules.fit.bowl import optimum as optimum
    from batchlab.rules.fit.bowl import timescale_optimum as timescale_optimum
    from batchlab.rules.fit.budgets_law import Budgets as Budgets
    from batchlab.rules.fit.budgets_law import budgets as budgets
    from batchlab.rules.fit.by_name import Fit as Fit
    from batchlab.rules.fit.by_name import fit as fit
    from batchlab.rules.fit.by_name import fit_laws as fit_laws
    from batchlab.rules.fit.chinchilla_law import ChinchillaLaw as ChinchillaLaw
    from batchlab.rules.fit.chinchilla_law import chinchilla as chinchilla
    from batchlab.rules.fit.chinchilla_law import chinchilla_constants as chinchilla_constants
    from batchlab.rules.fit.critical_batches import CriticalBatchLaw as CriticalBatchLaw
    from batchlab.rules.fit.critical_batches import LossCurves as LossCurves
    from batchlab.rules.fit.critical_batches import critical_batch_law as critical_batch_law
    from batchlab.rules.fit.critical_batches import loss_curves as loss_curves
    from batchlab.rules.fit.data_laws import DataLaw as DataLaw
    from batchlab.rules.fit.data_laws import RateLaw as RateLaw
    from batchlab.rules.fit.data_laws import data_law as data_law
    from batchlab.rules.fit.data_laws import rate_law as rate_law
    from batchlab.rules.fit.final_losses import extrapolated_final_losses as extrapolated_final_losses
    from batchlab.rules.fit.frontier import ComputeLaws as ComputeLaws
    from batchlab.rules.fit.frontier import compute_laws as compute_laws
    from batchlab.rules.fit.frontier import lower_envelope as lower_envelope
    from batchlab.rules.fit.joint_laws import JointLaw as JointLaw
    from batchlab.rules.fit.joint_laws import joint_law as joint_law
    from batchlab.rules.fit.loss_runs import LossRun as LossRun
    from batchlab.rules.fit.parametric import ParametricLaw as ParametricLaw
    from batchlab.rules.fit.parametric import parametric_laws as parametric_laws
    from batchlab.rules.fit.power_laws import PowerLaw as PowerLaw
    from batchlab.rules.fit.power_laws import power_law as power_law
    from batchlab.rules.fit.reading import from_study as from_study
    from batchlab.rules.fit.reading import read_runs as read_runs
    from batchlab.rules.fit.replicas import DilocoLaws as DilocoLaws
    from batchlab.rules.fit.replicas import ReplicaLaw as ReplicaLaw
    from batchlab.rules.fit.replicas import diloco as diloco
    from batchlab.rules.fit.replicas import replica_law as replica_law
    from batchlab.rules.fit.surge_runs import SurgeFit as SurgeFit
    from batchlab.rules.fit.surge_runs import surge as surge
    from batchlab.rules.fit.table import RunTable as RunTable
    from batchlab.rules.fit.timescales import TimescaleLaw as TimescaleLaw
    from batchlab.rules.fit.timescales import timescale as timescale
    from batchlab.rules.fit.trajectory_fit import trajectory as trajectory
    from batchlab.rules.fit.trajectory_law import CriticalLevel as CriticalLevel
    from batchlab.rules.fit.trajectory_law import TrajectoryLaw as TrajectoryLaw
    from batchlab.rules.fit.trajectory_table import loss_runs_of as loss_runs_of

_HOME = {
    "Optimum": "bowl",
    "batch_optimum": "bowl",
    "learning_rate_optimum": "bowl",
    "optimum": "bowl",
    "timescale_optimum": "bowl",
    "Budgets": "budgets_law",
    "budgets": "budgets_law",
    "Fit": "by_name",
    "fit": "by_name",
    "fit_laws": "by_name",
    "ChinchillaLaw": "chinchilla_law",
    "chinchilla": "chinchilla_law",
    "chinchilla_constants": "chinchilla_law",
    "CriticalBatchLaw": "critical_batches",
    "LossCurves": "critical_batches",
    "critical_batch_law": "critical_batches",
    "loss_curves": "critical_batches",
    "DataLaw": "data_laws",
    "RateLaw": "data_laws",
    "data_law": "data_laws",
    "rate_law": "data_laws",
    "extrapolated_final_losses": "final_losses",
    "ComputeLaws": "frontier",
    "compute_laws": "frontier",
    "lower_envelope": "frontier",
    "JointLaw": "joint_laws",
    "joint_law": "joint_laws",
    "LossRun": "loss_runs",
    "ParametricLaw": "parametric",
    "parametric_laws": "parametric",
    "PowerLaw": "power_laws",
    "power_law": "power_laws",
    "from_study": "reading",
    "read_runs": "reading",
    "DilocoLaws": "replicas",
    "ReplicaLaw": "replicas",
    "diloco": "replicas",
    "replica_law": "replicas",
    "SurgeFit": "surge_runs",
    "surge": "surge_runs",
    "RunTable": "table",
    "TimescaleLaw": "timescales",
    "timescale": "timescales",
    "trajectory": "trajectory_fit",
    "CriticalLevel": "trajectory_law",
    "TrajectoryLaw": "trajectory_law",
    "loss_runs_of": "trajectory_table",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
