"""What each law that `fit` knows says, in a sentence: as data, for `python -OO` strips docstrings."""

from __future__ import annotations

from collections.abc import Mapping

SAYS: Mapping[str, str] = {
    "power_law": "y = a·x^b between any two columns",
    "batch_optimum": "The batch of least loss, for one model and number of tokens",
    "learning_rate_optimum": "The learning rate of least loss, for one model, batch and number of tokens",
    "chinchilla": "loss = E + A/N^α + B/D^β",
    "budgets": "N, D, steps and batch for a compute; the batch for a number of tokens; the learning rate for a batch",
    "timescale": "tau_opt = c·(D/N)^m, from sweeps of weight decay",
    "critical_batch": 'The batch that costs 20 % more data, from steps to a target; by="params" or "tokens" also its '
    "growth",
    "critical_batch_growth": "The critical batch against the least tokens, a·D_min^p, from finished runs of several "
    "lengths",
    "diloco": "Loss, learning rate and batch against model size and replicas, A·N^α·M^β",
    "surge": "The learning rate's rise and peak with the batch, ε_max and B_noise, beside its SGD-like rivals",
    "trajectory": "loss = (N_c/N)^α_N + (S_c/S_min)^α_S, S_min = steps/(1 + B_*/(batch_tokens·loss^(1/α_B)))",
}
