"""Claim: on a CPU a step of CAME takes at most 0.7 times the step of pytorch_optimizer's CAME, at the same weights.

The matrices of a GPT-2 of width 512 with 8 layers: fused queries, keys and values 1536 x 512, projection 512 x 512, MLP
2048 x 512 and 512 x 2048, 25 million weights. Peers: pytorch_optimizer's CAME as it comes (foreach) and in its plain
loop, and the authors' came_pytorch; said to be absent where they are not installed. A rate of 1e-9 keeps the work the
same; the results are compared after 5 steps at a rate of 0.001.
"""

from functools import partial

import torch
from _paired import arguments, clock_of, median_ratio, name_of, paired_seconds, report

from batchlab.optim.came import CAME

SHAPES = [(1536, 512), (512, 512), (2048, 512), (512, 2048)] * 8


def peers():
    found = {}
    try:
        from pytorch_optimizer import CAME as theirs

        found["pytorch_optimizer.CAME"] = theirs
        found["pytorch_optimizer.CAME, foreach=False"] = partial(theirs, foreach=False)
    except ImportError:
        found["pytorch_optimizer.CAME"] = None
    try:
        from came_pytorch import CAME as authors

        found["came_pytorch.CAME"] = authors
    except ImportError:
        found["came_pytorch.CAME"] = None
    return found


def parameters(device, shapes=SHAPES):
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for each in made:
        each.grad = torch.randn(each.shape, generator=generator, device=device)
    return made


def gap(peer, device):
    """The largest difference between weights after 5 steps, as a share of the largest move."""
    ours, theirs, start = (parameters(device, SHAPES[:4]) for _ in range(3))
    for optimizer in (CAME(ours, lr=1e-3), peer(theirs, lr=1e-3)):
        for _ in range(5):
            optimizer.step()
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(theirs, start, strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True)) / moved


def main():
    given = arguments(__doc__, pairs=21)
    clock = clock_of(given)
    torch.set_num_threads(given.threads)
    rows = []
    for name, peer in peers().items():
        if peer is None:
            rows.append({"peer": name, "absent": True})
            continue
        for fused in (False, True) if given.device != "cpu" else (False,):
            ours = CAME(parameters(given.device), lr=1e-9, fused=fused)
            theirs = peer(parameters(given.device), lr=1e-9)
            pairs = paired_seconds(ours.step, theirs.step, pairs=given.pairs, warm_up=2, clock=clock)
            row = {"peer": name, "fused": fused, **median_ratio(pairs), "gap": gap(peer, given.device)}
            rows.append(row | {"threads": given.threads})
            print({key: value for key, value in rows[-1].items() if key != "pairs"}, flush=True)
    report(name_of("came_step", given), __doc__.split("\n")[0], rows, save=given.save)


if __name__ == "__main__":
    main()
