"""Claim: on a CPU a step of Muon takes no longer than torch.optim.Muon's and ends at the same weights.

The matrices of a GPT-2 of width 512 with 8 layers: fused queries, keys and values 1536 x 512, projection 512 x 512, MLP
2048 x 512 and 512 x 2048, 25 million weights. `foreach` batches those of one shape, as many at a time as there are
threads, which is the default on several; `no_check` does not look for gradients that are not finite. A rate of 0 keeps
the work the same; the results are compared at a rate of 0.01.
"""

from functools import partial

import torch
from _paired import arguments, clock_of, median_ratio, name_of, paired_seconds, report

from batchlab.optim.muon import Muon

SHAPES = [(1536, 512), (512, 512), (2048, 512), (512, 2048)] * 8


def parameters(device):
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in SHAPES]
    for each in made:
        each.grad = torch.randn(each.shape, generator=generator, device=device)
    return made


def gap(make, peer, device):
    """The largest difference between weights after 3 steps, as a share of the largest step."""
    ours, theirs, start = (parameters(device) for _ in range(3))
    for optimizer in (make(ours, lr=0.01), peer(theirs, lr=0.01)):
        for _ in range(3):
            optimizer.step()
    step = max(float((a - b).detach().abs().max()) for a, b in zip(theirs, start, strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True)) / step


def main():
    given = arguments(__doc__, pairs=21)
    clock = clock_of(given)
    torch.set_num_threads(given.threads)
    peer = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    sides = {
        "default": Muon,
        "no_check": partial(Muon, check_finite=False),
        "foreach": partial(Muon, foreach=True),
    }
    rows = []
    for name, make in sides.items():
        ours, theirs = make(parameters(given.device), lr=0.0), peer(parameters(given.device), lr=0.0)
        pairs = paired_seconds(ours.step, theirs.step, pairs=given.pairs, warm_up=1, clock=clock)
        row = {"ours": name, "peer": "torch.optim.Muon", **median_ratio(pairs), "gap": gap(make, peer, given.device)}
        rows.append(row)
        print({key: value for key, value in row.items() if key != "pairs"}, flush=True)
    report(
        name_of("muon_step", given),
        __doc__.split("\n")[0],
        [row | {"threads": given.threads} for row in rows],
        save=given.save,
    )


if __name__ == "__main__":
    main()
