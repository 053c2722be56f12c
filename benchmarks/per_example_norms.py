"""Claim: exact per-example gradient norms cost at most 1.25 times a training step's time and 1.10 times its memory.

4-layer GPTs of three shapes, AdamW, one micro-batch a step: the work of an example's norm falls against the pass's as
the layers widen, and rises with the length up to that of every gradient. Ours is `ExampleNorms.watch` around the
pass; beside it, each against the same plain step: ours with the normalisation layers alone, Opacus' ghost norms
(`GradSampleModuleFastGradientClipping`, the first backward pass alone), and `torch.func`'s `vmap(grad)`, which makes
every gradient. Before the timing all must find the same norms, and ours must leave the weights of a plain step in
every bit after it. Memory is the peak of a child process that takes ten steps, less that of a child that takes none.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _paired import arguments, median_ratio, paired_seconds, peak_bytes, report
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from batchlab.measure.examples.example_norms import ExampleNorms, norm_layer_names
from batchlab.workloads.models import ByteTransformer

TIME, MEMORY = 1.25, 1.10


class Shape(NamedTuple):
    """Of a 4-layer GPT and its batch."""

    width: int
    length: int
    examples: int


SHAPES = (Shape(128, 64, 32), Shape(256, 64, 32), Shape(384, 256, 8))  # the last: nanoGPT's on one machine
SIDES = ("ours", "ours, normalisation layers alone", "Opacus ghost norms", "vmap(grad)")


class GPT(ByteTransformer):
    """With positions in the form that Opacus knows: an embedding of indices for each example."""

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        out: Tensor = self.out(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return out


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean over the tokens of examples of one length."""
    return F.cross_entropy(model(tokens[:, :-1].contiguous()).flatten(0, 1), tokens[:, 1:].flatten())


class Side:
    """One copy of the model in training, whose `step` returns the squared norms, or None where nothing is measured."""

    def __init__(self, name: str, shape: Shape) -> None:
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        self.examples = shape.examples
        self.model = GPT(shape.length, width=shape.width, layers=4, heads=4)
        self.tokens = torch.randint(256, (shape.examples, shape.length + 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._measured: Callable[[], Tensor | None] = {
            "plain": self._plain,
            "ours": self._ours,
            "ours, normalisation layers alone": self._ours,
            "Opacus ghost norms": self._opacus,
            "vmap(grad)": self._vmap,
        }[name]
        if name.startswith("ours"):
            self._norms = ExampleNorms(self.model, parameters=norm_layer_names(self.model) if "," in name else None)
        elif name.startswith("Opacus"):
            self._wrapped = GradSampleModuleFastGradientClipping(self.model, use_ghost_clipping=True)

    def step(self) -> Tensor | None:
        """One update."""
        found = self._measured()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def _plain(self) -> None:
        loss_of(self.model, self.tokens).backward()

    def _ours(self) -> Tensor:
        with self._norms.watch(self.examples) as record:
            loss_of(self.model, self.tokens).backward()
        return record.sq_norms()

    def _opacus(self) -> Tensor:
        loss_of(self._wrapped, self.tokens).backward()
        return self._wrapped.get_norm_sample().square().double()

    def _vmap(self) -> Tensor:
        def one(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
            logits = functional_call(self.model, parameters, (tokens[None, :-1],))
            return F.cross_entropy(logits[0], tokens[1:])

        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        gradients = vmap(grad(one), in_dims=(None, 0))(parameters, self.tokens)
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name].mean(0)
        return sum(g.flatten(1).square().sum(1).double() for g in gradients.values())


def agree(shape: Shape) -> float:
    """The largest relative difference of ours and Opacus' norms from those of `vmap(grad)`, over examples."""
    ours, opacus, true = (Side(name, shape)._measured() for name in ("ours", "Opacus ghost norms", "vmap(grad)"))
    return max(((found - true) / true).abs().max().item() for found in (ours, opacus))


def main() -> None:
    """Prints a row for each shape and side, and one JSON object."""
    given = arguments(__doc__, pairs=30)
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if given.processor_time else time.perf_counter
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        difference = agree(shape)
        assert difference < 1e-5, f"the norms differ by {difference}"
        empty = peak_bytes(None, threads=given.threads)
        sides = {name: partial(Side, name, shape) for name in ("plain", *SIDES)}
        memory = {name: peak_bytes(make, threads=given.threads) - empty for name, make in sides.items()}
        for name in SIDES:
            row = shape._asdict() | {"side": name, "norms_differ_by": difference, "memory_bytes": memory[name]}
            row |= {"memory_ratio": memory[name] / memory["plain"]} | timed(name, shape, given.pairs, clock)
            if name == "ours":
                row["holds"] = row["high"] <= TIME and row["memory_ratio"] <= MEMORY
            rows.append(row)
            print(_sentence(row), flush=True)
    report("per_example_norms", (__doc__ or "").splitlines()[0], rows, save=given.save)


def timed(name: str, shape: Shape, pairs: int, clock: Callable[[], float]) -> dict[str, Any]:
    """The ratio of a side's time to the plain side's, in pairs of four steps each, or of one for `vmap(grad)`."""
    measured, plain = Side(name, shape), Side("plain", shape)
    calls = 1 if name == "vmap(grad)" else 4
    seconds = paired_seconds(measured.step, plain.step, pairs=pairs, calls=calls, clock=clock)
    same = all(map(torch.equal, measured.model.parameters(), plain.model.parameters()))
    assert same or not name.startswith("ours"), "measuring changed a weight"
    row: dict[str, Any] = median_ratio(seconds) | {"same_bits": same, "clock": clock.__name__, "calls": calls}
    return row | {"step_ms": 1e3 * min(plain for _, plain in seconds) / calls, "pairs": seconds}


def _sentence(row: dict[str, Any]) -> str:
    shape = f"width {row['width']}, length {row['length']}, batch {row['examples']}"
    time_ratio = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    memory = f"{row['memory_ratio']:.3f}"
    return f"{shape:34} {row['side']:34} time {time_ratio}, memory {memory} of {row['step_ms']:.0f} ms"


if __name__ == "__main__":
    main()
