"""Claim: the time of MKOR's factor update grows as width^2.3 at most, whatever the batch; a dense inverse's faster.

One factor of width 256 to 2048 in float32. Ours: `update_inverse_` with the mean of the rows, which the hooks have
summed. Beside it K-FAC's: the running average of the covariance of 512 rows, and its inverse by Cholesky with a
damping of 1e-3. Exponents are least-squares slopes of log time on log width, each width its median; the intervals are
bootstraps over the pairs at each width. Before the timing the update must be the inverse of the average to 1e-4.
"""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from _paired import arguments, clock_of, median_ratio, name_of, paired_seconds, report
from torch import Tensor

from batchlab.optim.mkor.factors import update_inverse_

WIDTHS = (256, 384, 512, 768, 1024, 1536, 2048)
ROWS, GAMMA, DAMPING, LIMIT = 512, 0.95, 1e-3, 2.3


def inverse_of_average(A: Tensor, rows: Tensor) -> Tensor:
    """K-FAC's: A ← γA + (1-γ)·aᵀa/N in place, and (A + damping)⁻¹."""
    A.addmm_(rows.T, rows, beta=GAMMA, alpha=(1 - GAMMA) / len(rows))
    damped = A.clone()
    damped.diagonal().add_(DAMPING)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def check(rows: Tensor) -> None:
    """The update is the inverse of the average."""
    v, P = rows.mean(0), torch.eye(rows.shape[1], device=rows.device)
    update_inverse_(P, v, gamma=GAMMA, eps=10.0, zeta=0.9)
    average = GAMMA * torch.eye(len(v), dtype=torch.float64, device=v.device) + (1 - GAMMA) * torch.outer(v, v).double()
    torch.testing.assert_close(P.double(), torch.linalg.inv(average), rtol=1e-4, atol=1e-4)


def times(width: int, *, pairs: int, clock: Any, device: str) -> list[tuple[float, float]]:
    """Seconds of one update, ours and theirs, of each pair."""
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)).to(device) + 1.0
    check(rows)
    P, A, v = torch.eye(width, device=device), torch.eye(width, device=device), rows.mean(0)
    calls = max(1, 2048 // width)
    found = paired_seconds(
        lambda: update_inverse_(P, v, gamma=GAMMA, eps=10.0, zeta=0.9),
        lambda: inverse_of_average(A, rows),
        pairs=pairs,
        warm_up=1,
        calls=calls,
        clock=clock,
    )
    return [(ours / calls, theirs / calls) for ours, theirs in found]


def slope(seconds: Sequence[float]) -> float:
    """The exponent of width in time."""
    x, y = [math.log(width) for width in WIDTHS], [math.log(each) for each in seconds]
    return statistics.linear_regression(x, y).slope


def exponent(samples: Sequence[Sequence[float]], *, resamples: int = 2000) -> dict[str, float]:
    """With its bootstrap 95 % interval; samples: seconds of each pair, for each width."""
    draw = random.Random(0)
    again = sorted(
        slope([statistics.median(draw.choices(each, k=len(each))) for each in samples]) for _ in range(resamples)
    )
    low, high = again[int(0.025 * resamples)], again[int(0.975 * resamples) - 1]
    return {"value": slope([statistics.median(each) for each in samples]), "low": low, "high": high}


def main() -> None:
    options = arguments(__doc__, pairs=15)
    torch.set_num_threads(options.threads)
    how = {"pairs": options.pairs, "clock": clock_of(options), "device": options.device}
    found = {width: times(width, **how) for width in WIDTHS}
    rows: list[dict[str, Any]] = []
    for side, name in enumerate(("MKOR, rank-one update", f"K-FAC, {ROWS} rows and dense inverse")):
        samples = [[pair[side] for pair in pairs] for pairs in found.values()]
        power = exponent(samples)
        row: dict[str, Any] = {"update": name, "exponent_of_width": power}
        row |= {f"ms_at_{width}": 1e3 * statistics.median(each) for width, each in zip(WIDTHS, samples)}
        row |= {"holds": power["high"] <= LIMIT} if side == 0 else {}
        rows.append(row | {"threads": options.threads, "processor_time": options.processor_time})
    rows += [{"update": f"ours/K-FAC at {width}", **median_ratio(pairs)} for width, pairs in found.items()]
    report(name_of("mkor_cost", options), (__doc__ or "").splitlines()[0], rows, save=options.save)


if __name__ == "__main__":
    main()
