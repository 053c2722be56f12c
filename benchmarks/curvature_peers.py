"""Claim: 30 steps of `curvature`'s Lanczos give both ends of a Hessian's spectrum, PyHessian's defaults one end.

One model, the digits MLP 64-32-10 with tanh, float32, at weights after 300 steps of SGD, all 1797 digits in one batch:
PyHessian 0.1 with its defaults (at most 100 products, stop at a relative change of 1e-3) for the top eigenvalue, beside
30 steps of Lanczos for both ends of the spectrum; then the trace from as many products on both sides. Seconds are
paired, in one process. The truth is the dense Hessian's `eigvalsh` in float64, printed with both errors. PyHessian's
density is left out: it calls `torch.eig`, which torch no longer has.
"""

import contextlib
import io
from typing import Any

import torch
from _paired import arguments, median_ratio, paired_seconds, report
from learning_rate_ceiling import cross_entropy, trained
from pyhessian import hessian
from torch import nn

from batchlab.measure.hessian.lanczos import extremes, lanczos, trace
from batchlab.measure.hessian.loss_surface import LossSurface


def dense(model: nn.Module, data: Any) -> torch.Tensor:
    """Ascending eigenvalues of the whole matrix."""
    surface = LossSurface(model, cross_entropy)
    with surface.still():
        H = surface.hessian([(data, len(data[0]))])
        rows = [H @ column for column in torch.eye(surface.size, dtype=surface.dtype)]
    return torch.linalg.eigvalsh(torch.stack(rows))


def ours(model: nn.Module, data: Any, steps: int, probes: int, seed: int) -> dict[str, float]:
    """Both ends of the spectrum, and the trace if there are probes."""
    surface, generator = LossSurface(model, cross_entropy), torch.Generator().manual_seed(seed)
    with surface.still():
        H = surface.hessian([(data, len(data[0]))])
        run = lanczos(H, steps, generator)
        largest, smallest = extremes(H, run, 1)
        found = {"largest": largest[0].value, "most_negative": smallest[0].value}
        return found | ({"trace": trace(H, run, probes, generator, 0.95).value} if probes else {})


def theirs(model: nn.Module, data: Any, probes: int, seed: int) -> dict[str, float]:
    """The top eigenvalue, and the trace if there are probes."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        peer = hessian(model, nn.CrossEntropyLoss(), data=data, cuda=False)
        values, _ = peer.eigenvalues(top_n=1)
        traces = peer.trace(maxIter=probes, tol=0.0) if probes else []
    model.zero_grad()
    return {"largest": values[0]} | ({"trace": sum(traces) / len(traces)} if traces else {})


def main() -> None:
    """Prints both sides' numbers with their errors, and one JSON object."""
    given = arguments(__doc__, pairs=10)
    torch.set_num_threads(given.threads)
    precise, (x, y) = trained(0)
    truth = dense(precise, (x, y))
    model, data = precise.float(), (x.float(), y)
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        mine, peer = ours(model, data, 30, 10, seed), theirs(model, data, 40, seed)
        row: dict[str, Any] = {"seed": seed, "true_largest": float(truth[-1]), "true_most_negative": float(truth[0])}
        row |= {"true_trace": float(truth.sum()), "ours": mine, "pyhessian": peer}
        row["relative_error_ours"] = abs(mine["largest"] / float(truth[-1]) - 1)
        row["relative_error_pyhessian"] = abs(peer["largest"] / float(truth[-1]) - 1)
        rows.append(row)
        print(row)
    seconds = paired_seconds(lambda: ours(model, data, 30, 0, 0), lambda: theirs(model, data, 0, 0), pairs=given.pairs)
    rows.append({"what": "seconds, ours over PyHessian's", **median_ratio(seconds), "pairs": seconds})
    report("curvature_peers", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
