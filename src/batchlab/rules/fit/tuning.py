"""The runs at the best learning rate of each setting: without it a law of batch size measures the rate instead."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchlab.rules.fit.table import Rows, RunTable

Array = NDArray[np.float64]
Ids = NDArray[np.intp]


def ids(*columns: Array) -> Ids:
    """A number for each row, the same where the rows agree in every column to 9 digits; in the columns' order."""
    with np.errstate(divide="ignore"):  # no replicas: -inf, which is like itself
        keys = np.round(np.log(np.stack(columns, 1)) * 1e9)
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1).astype(np.intp)


def tuned(losses: Array, setting: Ids, cell: Ids) -> NDArray[np.bool_]:
    """Whether each row is at its setting's best cell: that of least mean loss, over the rows that repeat it.

    setting: ids of what is to be tuned in, as (N, D, B). cell: ids of the same with the learning rate. Means, and not
    the least single run: of more repeats the least is lower by luck.
    """
    count = np.bincount(cell)
    with np.errstate(invalid="ignore"):
        means = np.bincount(cell, losses) / count
    best = np.full(int(setting.max()) + 1, np.inf)
    np.minimum.at(best, setting, means[cell])
    return means[cell] <= best[setting]


def tuned_rows(table: RunTable, *names: str) -> Rows:
    """The rows at the best learning rate of each setting of those columns; all rows where no rate is given."""
    if "learning_rate" not in table:
        return np.arange(len(table), dtype=np.intp)
    columns = [table[name] for name in names]
    return np.flatnonzero(tuned(table["loss"], ids(*columns), ids(*columns, table["learning_rate"])))


def edge_note(table: RunTable, rows: Rows, *names: str) -> str:
    """How many of the rows have the smallest or largest learning rate tried in their setting, of several; or ""."""
    if "learning_rate" not in table:
        return ""
    rates, setting = table["learning_rate"], ids(*(table[name] for name in names))
    low, high = np.full(int(setting.max()) + 1, np.inf), np.zeros(int(setting.max()) + 1)
    np.minimum.at(low, setting, rates)
    np.maximum.at(high, setting, rates)
    low, high = low[setting], high[setting]
    at_edge = (low < high) & ((rates == low) | (rates == high))
    count = int(at_edge[rows].sum())
    why = f"the best learning rate of {count} of {len(rows)} rows is at the edge of those tried: widen its sweep"
    return why if count else ""


def least_losses(table: RunTable) -> tuple[Array, Array, Array, list[str]]:
    """N, D, loss and run, one entry an (N, D): the mean loss of its best batch, where batches differ, at its best rate.

    A setting of several rows carries the run of the first.
    """
    batch = [name for name in ("batch_tokens", "batch_examples") if name in table][:1]
    rows = tuned_rows(table, "params", "tokens", *batch)
    params, tokens, losses = (table[name][rows] for name in ("params", "tokens", "loss"))
    length = ids(params, tokens)
    cell = ids(params, tokens, *(table[name][rows] for name in batch))
    kept = tuned(losses, length, cell)
    _, first, which = np.unique(length[kept], return_index=True, return_inverse=True)
    means = np.bincount(which, losses[kept]) / np.bincount(which)
    runs = [table.texts["run"][int(row)] for row in rows[kept][first]]
    return params[kept][first], tokens[kept][first], means, runs
