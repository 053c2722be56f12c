"""Claim: where another package's rule is the same rule, 100 steps in float64 end within 1e-12 of its weights.

Tensors of one to four dimensions; gradients follow the weights, so that a difference in one step is carried into the
next. The figure is the largest difference of a weight, relative to the largest weight. Where a package differs by
default, its option or ours is set so that both mean the same; the difference is named beside the figure. timm,
pytorch_optimizer and came_pytorch if they are installed.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _paired import report
from _peers import peers

from batchlab import optim

STEPS = 100
SAME = 1e-12
SHAPES = ((16, 8), (8, 16), (4, 3, 3, 3), (6, 5, 4), (16,))
MATRICES = ((16, 8), (8, 16), (12, 12))
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def trained(make: Make, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """The weights after 100 steps on noisy gradients of a quadratic bowl, float64."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    optimizer = make(made)
    for _ in range(STEPS):
        for each in made:
            each.grad = each.detach() + 0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [each.detach() for each in made]


def difference(ours: Make, theirs: Make, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> float:
    """The largest difference of a weight after 100 steps, relative to the largest weight."""
    a, b = trained(ours, shapes), trained(theirs, shapes)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / max(float(x.abs().max()) for x in a)


def torch_pairs() -> dict[str, tuple[Make, Make, str]]:
    """Rules that torch has itself, or that become one of torch's in a limit."""
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    ademamix = partial(optim.AdEMAMix, lr=0.01, alpha=0.0, weight_decay=0.1)
    mars = partial(optim.MARS, lr=0.01, gamma=0.0, betas=(0.9, 0.999), vector_betas=(0.9, 0.999), vector_lr=1.0)
    return {
        "AdEMAMix, alpha=0 / torch AdamW": (ademamix, adamw, ""),
        "MARS, gamma=0 / torch AdamW": (
            mars,
            partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0),
            "not the same where |g| > 1: MARS clips c, AdamW does not",
        ),
    }


def timm_pairs(found: dict[str, Callable[..., Any]]) -> dict[str, tuple[Make, Make, str]]:
    """timm adapts only tensors with decay unless told `always_adapt`, and clips the whole gradient to 1 in LAMB."""
    if "timm lamb" not in found:
        return {}
    lamb = partial(optim.LAMB, lr=0.01, exclude_vectors=False, eps=1e-6)
    lars = partial(optim.LARS, lr=0.5, exclude_vectors=False, momentum=0.9, trust=1e-2, lr_in_momentum=False, eps=1e-8)
    timm_lamb, timm_lars = found["timm lamb"], partial(found["timm lars"], momentum=0.9, trust_coeff=1e-2)
    return {
        "LAMB / timm": (
            partial(lamb, weight_decay=0.1),
            partial(timm_lamb, lr=0.01, weight_decay=0.1, max_grad_norm=None, eps=1e-6),
            "timm clips |g| to 1 by default",
        ),
        "LAMB, clipped / timm": (
            partial(lamb, weight_decay=0.1, max_grad_norm=1.0),
            partial(timm_lamb, lr=0.01, weight_decay=0.1, max_grad_norm=1.0, eps=1e-6),
            "",
        ),
        "LAMB, no decay / timm": (
            lamb,
            partial(timm_lamb, lr=0.01, weight_decay=0.0, max_grad_norm=None, always_adapt=True, eps=1e-6),
            "timm adapts only where there is decay, by default",
        ),
        "LAMB, ratio at most 1 / timm": (
            partial(lamb, weight_decay=0.1, max_ratio=1.0),
            partial(timm_lamb, lr=0.01, weight_decay=0.1, max_grad_norm=None, trust_clip=True, eps=1e-6),
            "",
        ),
        "LARS / timm": (
            partial(lars, weight_decay=1e-3),
            partial(timm_lars, lr=0.5, weight_decay=1e-3),
            "timm has the rate outside the momentum",
        ),
        "LARC / timm": (
            partial(lars, weight_decay=1e-3, clip=True),
            partial(timm_lars, lr=0.5, weight_decay=1e-3, trust_clip=True),
            "",
        ),
    }


def pytorch_optimizer_pairs(found: dict[str, Callable[..., Any]]) -> dict[str, tuple[Make, Make, str]]:
    """pytorch_optimizer puts its epsilons elsewhere: where they would tell, both are 0."""
    if "pytorch_optimizer lion" not in found:
        return {}
    package = importlib.import_module("pytorch_optimizer")
    mars = {"lr": 0.01, "betas": (0.95, 0.99), "eps": 0.0}
    return {
        "LAMB / pytorch_optimizer": (
            partial(
                optim.LAMB,
                lr=0.01,
                weight_decay=0.1,
                eps=0.0,
                exclude_vectors=False,
                bias_correction=False,
                clamp=(0, 10),
            ),
            partial(package.Lamb, lr=0.01, weight_decay=0.1, eps=0.0, weight_decouple=False, adam_debias=True),
            "by default it decays apart from the ratio and divides the whole step by 1 - beta1^t; |w| at most 10",
        ),
        "LARS / pytorch_optimizer": (
            partial(optim.LARS, lr=0.5, weight_decay=1e-3, trust=1e-2, lr_in_momentum=False),
            partial(package.LARS, lr=0.5, weight_decay=1e-3, trust_coefficient=1e-2),
            "it has the rate outside the momentum",
        ),
        "Lion / pytorch_optimizer": (
            partial(optim.Lion, lr=1e-3, weight_decay=0.1),
            partial(package.Lion, lr=1e-3, weight_decay=0.1),
            "",
        ),
        "AdEMAMix / pytorch_optimizer": (
            partial(optim.AdEMAMix, lr=0.01, betas=(0.9, 0.999, 0.9999), alpha=5.0),
            partial(package.AdEMAMix, lr=0.01, betas=(0.9, 0.999, 0.9999), alpha=5.0),
            "its decay goes into the gradient by default",
        ),
        "MARS / pytorch_optimizer": (
            partial(optim.MARS, **mars, vector_lr=1 / 3, vector_betas=(0.8, 0.999)),
            partial(package.MARS, **mars, lr_1d=0.01 / 3, betas_1d=(0.8, 0.999), weight_decay_1d=0.0),
            "it adds 1e-15 to the squares before their root",
        ),
        "CAME / pytorch_optimizer": (partial(optim.CAME, lr=1e-3), partial(package.CAME, lr=1e-3), ""),
    }


def came_pairs() -> dict[str, tuple[Make, Make, str]]:
    """The authors' package."""
    if importlib.util.find_spec("came_pytorch") is None:
        return {}
    package = importlib.import_module("came_pytorch")
    settings = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "weight_decay": 0.1}
    return {"CAME / came_pytorch": (partial(optim.CAME, **settings), partial(package.CAME, **settings), "")}


def muon() -> tuple[float, str]:
    """torch's Muon iterates in bfloat16: ours is asked for the same, and the figure is that of bfloat16."""
    ours = partial(optim.Muon, lr=0.01, weight_decay=0.1, ns_dtype=torch.bfloat16, scale="match_rms_adamw")
    theirs = partial(torch.optim.Muon, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return difference(ours, theirs, MATRICES), "bfloat16 iteration in both"


def main() -> None:
    """One row a pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/optimizer_equality.json")
    given = parser.parse_args()
    found = peers()
    pairs = torch_pairs() | timm_pairs(found) | pytorch_optimizer_pairs(found) | came_pairs()
    rows: list[dict[str, Any]] = []
    for name, (ours, theirs, note) in pairs.items():
        rows.append({"pair": name, "difference": difference(ours, theirs), "note": note})
    rows.append({"pair": "Muon / torch", **dict(zip(("difference", "note"), muon(), strict=True))})
    for row in rows:
        row["same"] = row["difference"] <= SAME
        print(f"{row['pair']:32}{row['difference']:10.1e}  {'same' if row['same'] else 'differs':8}{row['note']}")
    report("optimizer_equality", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
