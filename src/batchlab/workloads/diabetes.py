"""`diabetes`: how far the disease has progressed in a year, from ten measurements, as bundled with scikit-learn."""

from __future__ import annotations

import numpy as np

from batchlab.core.job import Job, Target
from batchlab.workloads.columns import Column
from batchlab.workloads.table import tabular


def diabetes(*, hidden: int = 64, optimizer: str = "adamw", target: Target | None = None) -> Job:
    """354 training and 88 validation patients; an MLP of 4,929 weights; mean absolute and squared error.

    Features and target are standardised with the training patients' mean and deviation. The loss is in squared
    deviations, so that 1 is what the mean predicts; "mae" and "mse" are in the score's own unit, 25 to 346. An R² is
    no mean over examples and is left out: 1 - loss is its like. Noise is large here: few patients, and about half
    of the variance unexplained by the best models.
    Data: Efron, Hastie, Johnstone and Tibshirani 2004, Least Angle Regression.

    >>> job = diabetes()
    >>> len(job.train), len(job.valid), tuple(job.train[0][0].shape)
    (354, 88, (10,))
    """
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    columns = [
        Column(name, "real", values.astype(np.float64))
        for name, values in zip(data.feature_names, data.data.T, strict=True)
    ]
    progression = Column("progression", "real", data.target.astype(np.float64))
    return tabular("diabetes", columns, progression, hidden=hidden, optimizer=optimizer, reach=target)
