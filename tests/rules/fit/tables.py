"""Tables of simulated runs with known laws."""

import numpy as np

from batchlab.rules.fit import RunTable

E, A, ALPHA, B_D, BETA = 1.7, 400.0, 0.34, 410.0, 0.28
N_SLOPE, D_SLOPE = BETA / (ALPHA + BETA), ALPHA / (ALPHA + BETA)
P = 0.264


def loss(n, d):
    return E + A / n**ALPHA + B_D / d**BETA


def best_batch(d):
    return 3.24e3 * d**P


def bowls(sizes=9, lengths=12, *, per_octave=1, curvature=0.01, noise=0.0, seed=0):
    """A bowl in ln B about B_opt = 3.24e3·D^0.264 on E + A/N^α + B/D^β: 3e7 to 3e9 N, 5e8 to 3e11 D, 2^17 to 2^24 B."""
    n, d, b = (
        each.ravel()
        for each in np.meshgrid(
            np.geomspace(3e7, 3e9, sizes),
            np.geomspace(5e8, 3e11, lengths),
            2.0 ** np.arange(17, 24.01, 1 / per_octave),
            indexing="ij",
        )
    )
    losses = loss(n, d) + curvature * np.log(b / best_batch(d)) ** 2
    losses = losses * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return RunTable.of({"params": n, "tokens": d, "batch_tokens": b, "loss": losses})


def sweeps_of_rate(gamma=0.8, *, noise=0.0, seed=0, rates=None, settings=((1e8, 2e9), (1e8, 2e10), (4e8, 2e10))):
    """At each (N, D) and batch a bowl in ln η about 1e-3·(N/1e8)^-0.3·(B/2^18)^γ, on the bowl in ln B of `bowls`."""
    rows = []
    for n, d in settings:
        for b in 2.0 ** np.arange(16, 23):
            best = 1e-3 * (n / 1e8) ** -0.3 * (b / 2**18) ** gamma
            for eta in best * 2.0 ** np.arange(-3, 4) * 1.1 if rates is None else rates:
                lowest = loss(n, d) + 0.01 * np.log(b / best_batch(d)) ** 2
                rows.append((n, d, b, eta, lowest + 0.02 * np.log(eta / best) ** 2))
    n, d, b, eta, losses = map(np.array, zip(*rows, strict=True))
    losses = losses + noise * np.random.default_rng(seed).standard_normal(len(losses))
    return RunTable.of({"params": n, "tokens": d, "batch_tokens": b, "learning_rate": eta, "loss": losses})
