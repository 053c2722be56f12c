"""Claim: a step of LAMB or LARS is no slower than the fastest peer's, and with `fused` takes at most twice the time
of torch's fused AdamW, on a CPU and on a GPU. By default that holds on a GPU, where both take kernels of batchlab's
own; on a CPU LARS takes torch's fused SGD for its second half and LAMB torch's fused Adam for its first, with which it
takes three times as long as AdamW, and nothing is compiled.

Parameter lists by shape alone, random gradients, a rate of 0, so that the work stays the same: a ResNet-50 (161
tensors, 25.6 million weights) and a GPT-2 of width 512 with 6 layers (76 tensors, 27 million). Peers as they are by
default and with `foreach` off where they have it; timm (clip off) and pytorch_optimizer if they are installed. Other
rules of batchlab stand beside torch's AdamW. Every ratio is the median over pairs of steps in turn.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _paired import arguments, clock_of, median_ratio, name_of, paired_seconds, report
from _peers import peers

from batchlab import optim

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of its parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if block == 0 else []
            shapes += [each for conv in convolutions for each in (conv, (conv[0],), (conv[0],))]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2(width: int = 512, layers: int = 6, vocabulary: int = 15_000, context: int = 512) -> list[tuple[int, ...]]:
    """The shapes of its parameters, the embedding tied."""
    pairs = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block = [each for pair in pairs for each in (pair, (pair[0],))] + [(width,)] * 4
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def parameters(shapes: list[tuple[int, ...]], device: str = "cpu") -> list[torch.nn.Parameter]:
    """Random weights and gradients."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    made = [torch.nn.Parameter(draw(shape)) for shape in shapes]
    for each in made:
        each.grad = draw(each.shape)
    return made


def ours() -> dict[str, Make]:
    """Every rule in its forms."""
    rules: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "lamb": partial(optim.LAMB, lr=0.0, weight_decay=0.01, exclude_vectors=False),
        "lars": partial(optim.LARS, lr=0.0, weight_decay=1e-4, exclude_vectors=False),
        "lion": partial(optim.Lion, lr=0.0),
        "signum": partial(optim.Signum, lr=0.0),
        "ademamix": partial(optim.AdEMAMix, lr=0.0),
        "mars": partial(optim.MARS, lr=0.0),
    }
    forms: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
    forms["fused"] = {"fused": True}
    every = {
        f"{rule} {form}": partial(make, **settings) for rule, make in rules.items() for form, settings in forms.items()
    }
    return every | {"lars": rules["lars"], "lamb": rules["lamb"]}


def theirs() -> dict[str, Make]:
    """Peers, and torch's AdamW in its three forms."""
    settings: dict[str, dict[str, Any]] = {
        "timm lamb": {"lr": 0.0, "weight_decay": 0.01, "max_grad_norm": None, "always_adapt": True},
        "timm lars": {"lr": 0.0, "weight_decay": 1e-4, "momentum": 0.9, "always_adapt": True},
        "pytorch_optimizer lamb": {"lr": 0.0, "weight_decay": 0.01},
        "pytorch_optimizer lars": {"lr": 0.0, "weight_decay": 1e-4},
    }
    found = {name: partial(make, **settings[name]) for name, make in peers().items() if name in settings}
    found |= {f"{name}, no foreach": partial(make, foreach=False) for name, make in found.items() if "pytorch" in name}
    adamw: dict[str, Make] = {"adamw fused": partial(torch.optim.AdamW, lr=0.0, fused=True)}
    adamw["adamw loop"] = partial(torch.optim.AdamW, lr=0.0, foreach=False)
    adamw["adamw foreach"] = partial(torch.optim.AdamW, lr=0.0, foreach=True)
    return found | adamw


def main() -> None:
    """Prints a row for each optimizer and list: its time and its ratio to torch's fused AdamW, pair by pair."""
    given = arguments(__doc__, pairs=15, only="the optimizer")
    torch.set_num_threads(given.threads)
    clock, lists = clock_of(given), {"resnet50": resnet50(), "gpt2": gpt2()}
    if given.device != "cpu":
        lists["gpt2 124M"] = gpt2(768, 12, 50_257, 1024)
    rows: list[dict[str, Any]] = []
    for shapes_name, shapes in lists.items():
        anchor = torch.optim.AdamW(parameters(shapes, given.device), lr=0.0, fused=True)
        for name, make in (ours() | theirs()).items():
            if given.only not in name:
                continue
            optimizer = make(parameters(shapes, given.device))
            pairs = paired_seconds(optimizer.step, anchor.step, pairs=given.pairs, warm_up=3, clock=clock)
            row = {"parameters": shapes_name, "optimizer": name} | median_ratio(pairs)
            row["ms"] = 1000 * statistics.median(ours for ours, _ in pairs)
            rows.append(row)
            print(
                f"{shapes_name} {name}: {row['ms']:.1f} ms, {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] "
                "of adamw fused",
                flush=True,
            )
    report(name_of("optimizer_step", given), " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
