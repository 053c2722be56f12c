"""Claim: on a CPU a GhostBatchNorm with `fused` takes at most 1.1 times as long as nn.BatchNorm, forward and backward;
and with it or without, ghosts in order take no longer than a loop of nn.BatchNorm over chunks. Without it the first
holds for feature maps of a convolution in the plain layout with ghosts of 2^18 numbers or more; smaller ones,
channels_last and tables take 1.1 to 2.5 times as long.

Shapes are batch x channels x places; ghosts as given. "chunks" is the loop with one nn.BatchNorm and `torch.cat`, "GBN"
pytorch-tabnet's layer where that is installed (one-dimensional; its chunks are as equal as can be, the same where the
ghost divides the batch). "interleaved" ghosts take every k-th example. Outputs are compared first. "kernels alone" and
"passes alone" are no layers but what the two ways cannot do without, with nothing joined, kept or tracked: PyTorch's
kernels on one ghost after another, and the passes over memory of formulas for all ghosts at once.
"""

import importlib.util
import sys
from functools import partial

import torch
from _paired import arguments, clock_of, median_ratio, name_of, paired_seconds, report
from torch import nn

from batchlab.nn import GhostBatchNorm1d, GhostBatchNorm2d

aten = torch.ops.aten
CASES = [
    ((2048, 64, 8, 8), 128, False),
    ((2048, 64, 8, 8), 128, True),
    ((512, 32, 16, 16), 32, False),
    ((512, 32, 16, 16), 32, True),
    ((256, 64, 8, 8), 16, False),
    ((256, 64, 8, 8), 16, True),
    ((1000, 64, 8, 8), 128, False),
    ((480, 16, 4, 4), 32, False),
    ((480, 16, 4, 4), 32, True),
    ((4096, 256), 128, False),
    ((1024, 64), 32, False),
]
ON_GPU = [
    ((256, 64, 56, 56), 32, False),
    ((256, 64, 56, 56), 32, True),
    ((1024, 256, 14, 14), 64, False),
    ((1024, 256, 14, 14), 64, True),
    ((2048, 64, 8, 8), 128, False),
    ((65536, 1024), 1024, False),
    ((4096, 256), 128, False),
]
OF_GPU = "On a GPU: ghosts, forward and backward, beside nn.BatchNorm and beside a loop of it over chunks."
OURS = {"ghosts": {}, "fused": {"fused": True}, "interleaved": {"interleaved": True}}


class Chunks(nn.Module):
    def __init__(self, norm, size):
        super().__init__()
        self.norm, self.size = norm, size

    def forward(self, x):
        return torch.cat([self.norm(part) for part in x.split(self.size)])


def tabnet():
    """pytorch-tabnet's GBN or None. Its package imports much that is not needed here, so that one file is read."""
    spec = importlib.util.find_spec("pytorch_tabnet")
    if spec is None:
        return None
    import types

    package = types.ModuleType("pytorch_tabnet")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["pytorch_tabnet"] = package
    return importlib.import_module("pytorch_tabnet.tab_network").GBN


def kernels(layer, x, grad, size):
    """PyTorch's kernels on one ghost after another, and nothing else."""
    x, weight, bias = x.detach(), layer.weight.detach(), layer.bias.detach()
    parts = list(zip(x.split(size), grad.split(size), strict=True))

    def run():
        for part, dy in parts:
            _, mean, invstd = torch.native_batch_norm(part, weight, bias, None, None, True, 0.1, 1e-5)
            aten.native_batch_norm_backward(dy, part, weight, None, None, mean, invstd, True, 1e-5, [True] * 3)

    return run


def passes(x, grad, size):
    """The nine passes that formulas for all ghosts need, four forward and five backward, and nothing else."""
    ghosts, channels = len(x) // size, x.shape[1]
    x, dy = (
        t.reshape(ghosts, size, -1) if t.is_contiguous() else t.movedim(1, -1).reshape(ghosts, -1, channels)
        for t in (x.detach(), grad)
    )
    scale, shift = torch.randn(2, ghosts, 1, x.shape[2], device=x.device)
    y, dx = torch.empty(2, *x.shape, device=x.device)

    def run():
        x.sum(1, keepdim=True)
        aten.mse_loss(x, shift, 0, out=y)
        y.sum(1, keepdim=True)
        torch.addcmul(shift, x, scale, out=y)
        dy.sum(1, keepdim=True)
        aten.mse_loss_backward(dy, x, shift, 0, grad_input=dx)
        dx.sum(1, keepdim=True)
        torch.addcmul(dy, x, scale, out=dx)
        torch.addcmul(shift, dx, scale, out=dx)

    return run


def step(layer, x, grad):
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def main():
    given = arguments(__doc__, pairs=31)
    clock = clock_of(given)
    torch.set_num_threads(given.threads)
    gbn, rows = tabnet(), []
    for shape, ghost, last in CASES if given.device == "cpu" else ON_GPU:
        plain, ours = (nn.BatchNorm2d, GhostBatchNorm2d) if len(shape) == 4 else (nn.BatchNorm1d, GhostBatchNorm1d)
        x, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(given.device)
        if last:
            x, grad = (each.to(memory_format=torch.channels_last) for each in (x, grad))
        x.requires_grad_()
        channels = shape[1]
        plain, ours = partial(plain, device=given.device), partial(ours, device=given.device)
        peers = {"BatchNorm": plain(channels), "chunks": Chunks(plain(channels), ghost)}
        if gbn is not None and len(shape) == 2:
            peers["GBN"] = gbn(channels, ghost, momentum=0.1)
        layer = ours(channels, ghost)
        for name, peer in peers.items():
            if name != "BatchNorm":
                torch.testing.assert_close(layer(x), peer(x), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(ours(channels, ghost, fused=True)(x), peer(x), rtol=1e-4, atol=1e-4)
        sides = {name: step(ours(channels, ghost, **how), x, grad) for name, how in OURS.items()}
        sides["kernels alone"] = kernels(layer, x, grad, ghost)
        if len(x) % ghost == 0:
            sides["passes alone"] = passes(x, grad, ghost)
        for mine, side in sides.items():
            for name, peer in peers.items() if mine in OURS else [("BatchNorm", peers["BatchNorm"])]:
                calls = 1 if x.numel() > 10**6 else 10
                pairs = paired_seconds(
                    side, step(peer, x, grad), pairs=given.pairs, warm_up=3, calls=calls, clock=clock
                )
                memory = "channels_last" if last else "contiguous"
                case = {"shape": " x ".join(map(str, shape)), "memory": memory, "ghost": ghost, "ours": mine}
                rows.append({**case, "peer": name, **median_ratio(pairs)})
                print({key: value for key, value in rows[-1].items() if key != "pairs"}, flush=True)
    claim = " ".join(__doc__.split("\n\n")[0].split()) if given.device == "cpu" else OF_GPU
    report(
        name_of("ghost_batchnorm", given), claim, [row | {"threads": given.threads} for row in rows], save=given.save
    )


if __name__ == "__main__":
    main()
