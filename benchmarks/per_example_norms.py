"""Claim: exact per-example gradient norms cost at most 1.25 times a training step's time and 1.10 times its memory.

A 4-layer GPT, width 128, length 64, batch 32, AdamW, one micro-batch a step. Ours is `ExampleNorms.watch` around the
pass; beside it, each against the same plain step: ours with the normalisation layers alone, Opacus' ghost norms
(`GradSampleModuleFastGradientClipping`, the first backward pass alone), and `torch.func`'s `vmap(grad)`, which makes
every gradient. Before the timing all must find the same norms, and ours must leave the weights of a plain step in
every bit after it. Memory is the peak of a child process that takes ten steps, less that of a child that takes none.
"""

import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _paired import arguments, median_ratio, paired_seconds, report
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from batchlab.measure.examples.example_norms import ExampleNorms, norm_layer_names
from batchlab.workloads.models import ByteTransformer

TIME, MEMORY = 1.25, 1.10
EXAMPLES, LENGTH = 32, 64
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

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = GPT(LENGTH, width=128, layers=4, heads=4)
        self.tokens = torch.randint(256, (EXAMPLES, LENGTH + 1))
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
        with self._norms.watch(EXAMPLES) as record:
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


def peak_bytes(name: str | None, threads: int) -> int:
    """The peak memory of this process after ten steps of a side, or after the imports alone (Linux)."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    side = None if name is None else Side(name)
    for _ in range(10 if side else 0):
        side.step()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_child(name: str | None, threads: int) -> int:
    """`peak_bytes` of a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes, (name, threads))


def agree() -> float:
    """The largest relative difference of ours and Opacus' norms from those of `vmap(grad)`, over examples."""
    ours, opacus, true = (Side(name)._measured() for name in ("ours", "Opacus ghost norms", "vmap(grad)"))
    return max(((found - true) / true).abs().max().item() for found in (ours, opacus))


def main() -> None:
    """Prints a row for each side and one JSON object."""
    given = arguments(__doc__, pairs=30)
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if given.processor_time else time.perf_counter
    difference = agree()
    assert difference < 1e-5, f"the norms differ by {difference}"
    empty = in_child(None, given.threads)
    memory = {name: in_child(name, given.threads) - empty for name in ("plain", *SIDES)}
    rows: list[dict[str, Any]] = []
    for name in SIDES:
        measured, plain = Side(name), Side("plain")
        calls = 1 if name == "vmap(grad)" else 4
        seconds = paired_seconds(measured.step, plain.step, pairs=given.pairs, calls=calls, clock=clock)
        same = all(map(torch.equal, measured.model.parameters(), plain.model.parameters()))
        assert same or not name.startswith("ours"), "measuring changed a weight"
        row = {"side": name, **median_ratio(seconds), "memory_ratio": memory[name] / memory["plain"]}
        row |= {"same_bits": same, "norms_differ_by": difference, "memory_bytes": memory[name], "clock": clock.__name__}
        row |= {"calls": calls, "step_ms": 1e3 * min(plain for _, plain in seconds) / calls, "pairs": seconds}
        if name == "ours":
            row["holds"] = row["high"] <= TIME and row["memory_ratio"] <= MEMORY
        rows.append(row)
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(
            f"{name:34} time {row['ratio']:.3f} {interval}, memory {row['memory_ratio']:.3f} of {row['step_ms']:.0f} ms"
        )
    report("per_example_norms", (__doc__ or "").splitlines()[0], rows, save=given.save)


if __name__ == "__main__":
    main()
