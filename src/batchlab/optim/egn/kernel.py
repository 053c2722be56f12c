"""K = J Jᵀ of a network, without J: one block of J's columns at a time, over all examples of all ranks.

J in R^(bc x d) stacks the Jacobians of the b examples' c outputs by the d trained weights. Row i·c + k is output k of
example i; with several ranks, the first rank's examples come first. Nothing here is a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchlab.core.errors import InputError
from batchlab.optim.egn.loss import Terms, rooted
from batchlab.parallel.agree import device_of

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # of an example alone against it in its batch


class Network(NamedTuple):
    """f(x; w). weights: w, by name. fixed: parameters that stay. buffers: copies, so that the model's own stay."""

    model: nn.Module
    weights: dict[str, Tensor]
    fixed: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def __call__(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        outputs = functional_call(self.model, {**self.buffers, **self.fixed, **weights}, (inputs,))
        if not isinstance(outputs, Tensor):
            raise InputError(f"model must return a tensor, got {type(outputs).__name__}: wrap it in one that does")
        return outputs


@dataclass(frozen=True)
class Ranks:
    """The processes that hold the batch together; counts: examples on each. group None: this one alone."""

    group: Any
    counts: tuple[int, ...]

    @classmethod
    def of(cls, group: Any, examples: int) -> Ranks:
        """Learns from every rank how many examples it holds; `InputError` on all of them where one holds none."""
        counts = [examples]
        if group is not None:
            own = torch.tensor([examples], device=device_of(group))
            parts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, own, group=group)
            counts = [int(part) for part in parts]
        if min(counts) < 1:
            raise InputError(f"every rank must have at least 1 example, got {counts} examples on the ranks")
        return cls(group, tuple(counts))

    def own(self, rows: Tensor, per_example: int = 1) -> Tensor:
        """This rank's rows of a joined tensor."""
        if self.group is None:
            return rows
        rank = dist.get_rank(self.group)
        start = sum(self.counts[:rank])
        return rows[start * per_example : (start + self.counts[rank]) * per_example]

    def join(self, part: Tensor, per_example: int = 1) -> Tensor:
        """The rows of all ranks, in the order of ranks."""
        if self.group is None:
            return part
        sizes = [count * per_example for count in self.counts]
        padded = part.new_zeros((max(sizes), *part.shape[1:]), device=device_of(self.group))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)]).to(part.device)

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Σ over ranks of each tensor."""
        if self.group is not None:
            for name, tensor in tensors.items():
                moved = tensor.to(device_of(self.group)).contiguous()
                dist.all_reduce(moved, group=self.group)
                tensors[name] = moved.to(tensor.device)
        return tensors


def check_layers(model: nn.Module) -> None:
    """Refuses layers that mix examples, draw random numbers or have sparse gradients, by their names."""
    for name, module in model.named_modules():
        kind, where = type(module).__name__, name or "model"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(f"{where} is a {kind} in training mode, which mixes the examples: call its .eval()")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise InputError(
                f"{where} is a {kind} in training mode, which J cannot repeat: call its .eval() or set p=0"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise InputError(f"{where}.weight would have sparse gradients, which EGN cannot take: set sparse=False")


def check_buffers(net: Network) -> None:
    """Refuses a model whose forward has written into its buffers."""
    for name, buffer in net.buffers.items():
        if buffer._version:
            raise InputError(
                f"model changes its buffer {name} in forward, so that f is no function: call .eval() on it"
            )


def outputs_of(net: Network, weights: Mapping[str, Tensor], batch: Sequence[Tensor]) -> Tensor:
    """f of all micro-batches, [b, ...]."""
    parts = []
    for inputs in batch:
        outputs = net(weights, inputs)
        if outputs.ndim == 0 or len(outputs) != len(inputs):
            raise InputError(f"model must give a row an example, got {tuple(outputs.shape)} for {len(inputs)} examples")
        parts.append(outputs)
    return torch.cat(parts)


def gram(
    net: Network, batch: Sequence[Tensor], outputs: Tensor, ranks: Ranks, *, chunk: int | None, memory_bytes: int
) -> Tensor:
    """K, [bc, bc], in the dtype of `outputs` [b, c], which are those of all ranks, from the batches as they are.

    chunk: examples that are differentiated together; None takes as many as memory_bytes allow. memory_bytes: bound
    on a block of J's columns, and on one chunk's Jacobian; where all of J fits there is one block. An example whose
    outputs alone are not those it has in its batch is refused.
    """
    n, c = outputs.numel(), outputs[0].numel()
    K = outputs.new_zeros(n, n)
    mine, own_outputs = ranks.own(K, c), ranks.own(outputs)
    width = max(1, memory_bytes // (n * outputs.element_size()))
    for block, columns in enumerate(_blocks({name: w.numel() for name, w in net.weights.items()}, width)):
        held = c * sum(net.weights[name].numel() * net.weights[name].element_size() for name in columns)
        step = max(1, memory_bytes // held) if chunk is None else chunk
        parts, start = [], 0
        for inputs in batch:
            for examples in torch.split(inputs, step):
                rows, alone = _jacobian(net, columns, examples)
                if not block:
                    _check_alone(net, rows, alone, own_outputs[start : start + len(examples)])
                parts.append(rows)
                start += len(examples)
        J = torch.cat(parts)
        mine.addmm_(J.to(K), ranks.join(J, c).to(K).T)
    return ranks.join(mine, c)


def _blocks(sizes: Mapping[str, int], width: int) -> list[dict[str, slice]]:
    """The columns of J in blocks of at most `width`: by parameter, which of its entries."""
    blocks: list[dict[str, slice]] = [{}]
    left = width
    for name, size in sizes.items():
        done = 0
        while done < size:
            if not left:
                blocks.append({})
                left = width
            take = min(left, size - done)
            blocks[-1][name] = slice(done, done + take)
            done, left = done + take, left - take
    return blocks


def _jacobian(net: Network, columns: Mapping[str, slice], examples: Tensor) -> tuple[Tensor, Tensor]:
    """J's rows of some examples in the given columns, and the outputs of each example alone, [m, c]."""

    def alone(weights: dict[str, Tensor], example: Tensor) -> tuple[Tensor, Tensor]:
        outputs = net({**net.weights, **weights}, example[None]).flatten()
        return outputs, outputs

    chosen = {name: net.weights[name] for name in columns}
    try:
        with torch.enable_grad():  # some kernels keep what their derivative needs only then
            jacobians, outputs = vmap(jacrev(alone, has_aux=True), (None, 0))(chosen, examples)
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise InputError(
            "model cannot be differentiated example by example with torch.func (random layers in training mode, "
            f"in-place changes of buffers and reentrant checkpoints cannot): {what}"
        ) from error
    rows = len(examples) * outputs.shape[1]
    return torch.cat([jacobians[name].reshape(rows, -1)[:, part] for name, part in columns.items()], 1), outputs


def _check_alone(net: Network, rows: Tensor, alone: Tensor, together: Tensor) -> None:
    """Refuses outputs that differ by more than rounding of the terms |J||w| that they are made of."""
    terms = rows.norm(dim=1).max() * sum(w.norm() ** 2 for w in net.weights.values()) ** 0.5
    reach = _TOLERANCE.get(alone.dtype, 0.1) * torch.maximum(together.abs().max(), terms)
    worst = (alone.to(together) - together.reshape(alone.shape)).abs().max()
    if bool(worst > reach):
        raise InputError(
            "model must treat the examples of a batch on their own, but an example's outputs change by "
            f"{worst.item():.3g} when it is alone: normalise over features or groups, not over the batch"
        )


def pull_back(net: Network, batch: Sequence[Tensor], rows: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """Jᵀz by parameter, summed over all ranks, one vjp a micro-batch; rows: z of all ranks, [bc]."""
    own, start = ranks.own(rows, len(rows) // sum(ranks.counts)), 0
    total = {name: torch.zeros_like(w) for name, w in net.weights.items()}
    for inputs in batch:
        with torch.enable_grad():
            outputs, back = vjp(_at(net, inputs), net.weights)[:2]
        part = own[start : start + outputs.numel()].reshape(outputs.shape)
        for name, term in back(part.to(outputs))[0].items():
            total[name] += term
        start += outputs.numel()
    return ranks.sum(total)


def push_forward(net: Network, batch: Sequence[Tensor], step: dict[str, Tensor], ranks: Ranks) -> Tensor:
    """Jδ of all ranks, [b, c]: one forward-mode pass a micro-batch.

    Attention is decomposed there, for torch's fast kernels have no forward mode.
    """
    parts, fast = [], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for inputs in batch:
                pushed = jvp(_at(net, inputs), (net.weights,), (step,))[1]
                parts.append(pushed.detach().reshape(len(inputs), -1))
    except NotImplementedError as error:
        raise InputError(
            "momentum, or several rates, with a line search or adaptive damping need forward-mode differentiation, "
            f"which this model has not: take momentum=0 and one lr, or neither of the two. {str(error).splitlines()[0]}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return ranks.join(torch.cat(parts))


def _at(net: Network, inputs: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: net(weights, inputs)


def times(block: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
    """A block-diagonal matrix, blocks [b, c, c] or its diagonal [b, c], or its transpose, times rows [b, c, ...]."""
    if block.ndim == 2:
        return block.reshape(*block.shape, *[1] * (rows.ndim - 2)) * rows
    return torch.einsum("bji,bj...->bi..." if transpose else "bij,bj...->bi...", block, rows)


def dual_solve(K: Tensor, terms: Terms, damping: float, solver: str) -> Tensor:
    """z in R^(bc) with -Jᵀz = -(H + λI)⁻¹g, where g = Jᵀr/b and H = JᵀQJ/b; λ is `damping`.

    "lu": (QK + bλI) z = r, which is not symmetric. "cholesky": z = S(SᵀKS + bλI)⁻¹u with Q = SSᵀ and r = Su.
    `InputError` where the system is singular in its dtype.
    """
    if solver not in ("lu", "cholesky"):
        raise InputError(f'solver must be "lu" or "cholesky", got {solver!r}')
    b, c = terms.r.shape
    n = b * c
    ridge = torch.full((n,), b * damping, dtype=K.dtype, device=K.device)
    if solver == "lu":
        A = times(terms.Q, K.view(b, c, n)).reshape(n, n)
        A.diagonal().add_(ridge)
        z: Tensor
        z, failed = torch.linalg.solve_ex(A, terms.r.flatten())
    else:
        root, u = rooted(terms)
        half = times(root, K.view(b, c, n), transpose=True).reshape(n, n).T.reshape(b, c, n)
        A = times(root, half, transpose=True).reshape(n, n)
        A.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(A)
        z = times(root, torch.cholesky_solve(u.reshape(n, 1), factor).view(b, c)).flatten()
    if bool(failed):
        raise InputError(
            f"the {n} x {n} system is singular in {K.dtype} at damping={damping!r}: raise damping"
            + ("" if K.dtype == torch.float64 else ", or use solve_dtype=torch.float64")
        )
    return z
