"""Claim: on a CPU a GhostBatchNorm takes at most 1.1 times as long as nn.BatchNorm, forward and backward, and no longer
than a loop of nn.BatchNorm over chunks. It holds for feature maps of a convolution; small maps and tables take two to
four times as long as nn.BatchNorm.

Shapes are batch x channels x places; ghosts as given. "chunks" is the loop with one nn.BatchNorm and `torch.cat`, "GBN"
pytorch-tabnet's layer where that is installed (one-dimensional; its chunks are as equal as can be, the same where the
ghost divides the batch). "interleaved" ghosts take every k-th example. Outputs are compared first.
"""

import importlib.util
import sys
import time

import torch
from _paired import arguments, median_ratio, paired_seconds, report
from torch import nn

from batchlab.nn import GhostBatchNorm1d, GhostBatchNorm2d

CASES = [
    ((2048, 64, 8, 8), 128, False),
    ((2048, 64, 8, 8), 128, True),
    ((512, 32, 16, 16), 32, False),
    ((512, 32, 16, 16), 32, True),
    ((256, 64, 8, 8), 16, False),
    ((1000, 64, 8, 8), 128, False),
    ((480, 16, 4, 4), 32, False),
    ((4096, 256), 128, False),
    ((1024, 64), 32, False),
]


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


def step(layer, x, grad):
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def main():
    given = arguments(__doc__, pairs=31)
    clock = time.process_time if given.processor_time else time.perf_counter
    torch.set_num_threads(given.threads)
    gbn, rows = tabnet(), []
    for shape, ghost, last in CASES:
        plain, ours = (nn.BatchNorm2d, GhostBatchNorm2d) if len(shape) == 4 else (nn.BatchNorm1d, GhostBatchNorm1d)
        x, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        if last:
            x, grad = (each.to(memory_format=torch.channels_last) for each in (x, grad))
        x.requires_grad_()
        channels = shape[1]
        peers = {"BatchNorm": plain(channels), "chunks": Chunks(plain(channels), ghost)}
        if gbn is not None and len(shape) == 2:
            peers["GBN"] = gbn(channels, ghost, momentum=0.1)
        layer = ours(channels, ghost)
        for name, peer in peers.items():
            if name != "BatchNorm":
                torch.testing.assert_close(layer(x), peer(x))
        for mine, interleaved in (("ghosts", False), ("interleaved", True)):
            layer = ours(channels, ghost, interleaved=interleaved)
            for name, peer in peers.items():
                calls = 1 if x.numel() > 10**6 else 10
                pairs = paired_seconds(
                    step(layer, x, grad), step(peer, x, grad), pairs=given.pairs, warm_up=3, calls=calls, clock=clock
                )
                memory = "channels_last" if last else "contiguous"
                case = {"shape": " x ".join(map(str, shape)), "memory": memory, "ghost": ghost, "ours": mine}
                rows.append({**case, "peer": name, **median_ratio(pairs)})
                print({key: value for key, value in rows[-1].items() if key != "pairs"}, flush=True)
    claim = " ".join(__doc__.split("\n\n")[0].split())
    report("ghost_batchnorm", claim, [row | {"threads": given.threads} for row in rows], save=given.save)


if __name__ == "__main__":
    main()
