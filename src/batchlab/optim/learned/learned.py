"""A learned optimizer, small_fc_lopt: a small network decides each weight's step (Metz et al. 2022, arXiv 2203.11860).

  (d, q) = network(28 features of the weight, 11 of the step)      see `learned.features`
  w ← w - γ·s·d·exp(εq)      then w ← w·(1 - γλ) where λ > 0

γ lr, s step_mult, ε exp_mult, λ weight_decay; d the direction, q the magnitude, for every element of every tensor.
The features hold averages over each whole tensor, and no loss. PyLO (Janson et al. 2025, arXiv 2506.10315) has it as
a torch optimizer: with its `AdafacLO_naive` this agreed to 6e-8 over 20 float32 steps on shapes (7,), (5, 3),
(4, 3, 3, 3), (6, 6), and to 5e-7 with weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from batchlab.core.checks import check_count, check_positive, check_rate
from batchlab.core.errors import InputError
from batchlab.optim.leaf import Leaf
from batchlab.optim.learned.features import (
    FEATURES,
    Piece,
    at,
    divided,
    factored_dims,
    features,
    network,
    pieces,
    row_factor,
    time_features,
)
from batchlab.optim.learned.weights import OptimizerWeights, load_weights
from batchlab.optim.rule import Numbers, Rule, Sum
from batchlab.optim.shell import RuleOptimizer
from batchlab.parallel.shards import is_spread, share
from batchlab.parallel.sums import sums_over

BLOCK = {"cpu": 4096}  # elements, measured; elsewhere 2^20, for launches are dear there and memory is wide


def small_fc_lopt_(
    w: Tensor,
    g: Tensor,
    momenta: Tensor,
    rms: Tensor,
    row: Tensor,
    column: Tensor,
    time: Tensor,
    betas: Tensor,
    *layers: Tensor,
    lr: float,
    step_mult: float,
    exp_mult: float,
    weight_decay: float,
    sizes: tuple[int, ...],
    dims: tuple[int, int] | None,
    chunk: int | None,
    block: int | None,
) -> Rule:
    """One step on one tensor whose last dimension is d0 and whose second last is d1.

    momenta: (3, *w.shape). row, column: as momenta with 1 in place of d0 and of d1; of a vector both are one tensor.
    time: (11,). betas: (7,). sizes: elements of the whole tensor, then of its d1 and d0. dims: what (d1, d0) are in the
    tensor as it is spread; None for a vector. chunk: most elements that the network takes at once; block: most whose
    squares are summed at once, apart from `chunk` so that this changes nothing.
    """
    stack = (-1,) + (1,) * w.ndim
    beta_m, beta_v, beta_r = betas[:3], betas[3], betas[4:]
    g_sq = g.square()
    _average(momenta, beta_m.view(stack), g)
    _average(rms, beta_v, g_sq)
    if dims is None:
        _average(row, beta_r.view(stack), g_sq + 1e-30)
        factors = None
    else:
        over_d1, over_d0 = (dims[0],), (dims[1],)
        row_sq = yield Sum(g_sq.sum(-1, keepdim=True), over_d0)
        column_sq = yield Sum(g_sq.sum(-2, keepdim=True), over_d1)
        _average(row, beta_r.view(stack), row_sq / sizes[2] + 1e-30)
        _average(column, beta_r.view(stack), column_sq / sizes[1] + 1e-30)
        row_sum = yield Sum(row.sum(-2, keepdim=True), over_d1)
        factors = row_factor(row, row_sum / sizes[1])

    def seen(piece: Piece) -> Tensor:
        w_, g_, rms_ = (at(each, piece, stacked=False) for each in (w, g, rms))
        momenta_, row_, column_ = (at(each, piece, stacked=True) for each in (momenta, row, column))
        factors_ = None if factors is None else at(factors, piece, stacked=True)
        return features(w_, g_, momenta_, rms_, row_, column_, factors_).reshape(FEATURES, -1)

    x = None
    squares = g_sq.new_zeros(FEATURES)
    for piece in pieces(w.shape, block):
        x = seen(piece)
        squares = squares + torch.linalg.vector_norm(x, dim=1).square()
    squares = yield Sum(squares)
    folded = divided(layers, squares / sizes[0], time)
    for piece in pieces(w.shape, chunk):
        d, q = network(folded, x if piece == () and x is not None and x.shape[1] == w.numel() else seen(piece))
        held = at(w, piece, stacked=False)
        held.sub_((q.mul(exp_mult).exp_() * d).mul_(step_mult).mul_(lr).view(held.shape))
    if weight_decay:
        w.mul_(1 - lr * weight_decay)
    return None


class LearnedOptimizer(RuleOptimizer):
    """A learned optimizer that comes with its weights: no rate to tune, a dear step.

    lr: γ, 1 as it was trained; schedulers may lower it. weights: a .safetensors or .npz file or a dict in PyLO's or
    JAX's layout (`load_weights`); None for those that ship, which `scripts/meta_train_optimizer.py` made and whose
    metadata, `.weights.about`, say how. Nothing is downloaded. step_mult, exp_mult: s and ε; None for those of the
    weights' file, else PyLO's 0.01 and 0.001 (JAX's own default of s is 0.001). weight_decay: λ, after the step and
    times γ: at γ = 1, 0.1 takes a tenth of each weight away at each step; 1e-5 is a usual order. max_grad_norm: clips
    the gradient of each tensor by itself, as PyLO does. chunk: most elements that the network takes at once, some
    4·(28 + 2·hidden) bytes each; by default 4,096 on CPUs and 2^20 elsewhere. It changes no bit of the result on CPUs.
    fused: compiles the rule, unchunked.

    State: 4 numbers a parameter and 3 for each row and column of matrices, 7 of vectors, in float32 at least. Work:
    some 4,700 flops a parameter and step, whatever the batch: `batchlab.planner.optimizer_overhead` gives the batch
    from which on that is a small share. It sees no batch size, and nothing is scaled with it. Not for tasks far from
    those it was trained on (the weights that ship: MLPs of at most 2,410 parameters, 100 steps, batches of 16 to 64):
    there they beat SGD at its best rate by a quarter of the mean loss, and on networks five times as large they lose.
    Numbers (0 dimensions) count as vectors of one. Time is counted by tensor and stays with its state.

    Gradients are means over examples, accumulated and unscaled before the step. One that is not finite is refused by
    name before anything moves. Raises `InputError` for weights of other shapes, and for a state of other weights.

    >>> layers = {"w0": torch.zeros(39, 4), "b0": torch.zeros(4), "w1": torch.zeros(4, 2), "b1": torch.tensor([1, 0])}
    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> w.grad = torch.tensor([[100.0, 0.0]])
    >>> LearnedOptimizer([w], weights=layers).step()
    >>> w.detach()  # this network says d = 1 for all
    tensor([[2.9900, 3.9900]])
    """

    LOW_BITS = False
    FLAT = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        weights: str | Path | Mapping[str, Any] | OptimizerWeights | None = None,
        *,
        step_mult: float | None = None,
        exp_mult: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        chunk: int | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        self.weights = load_weights(weights)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
        defaults = {
            "lr": lr,
            "step_mult": self.weights.step_mult if step_mult is None else step_mult,
            "exp_mult": self.weights.exp_mult if exp_mult is None else exp_mult,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "chunk": chunk,
            "weights_digest": self.weights.digest,
        }
        super().__init__(params, defaults, fused=fused, maximize=maximize, differentiable=differentiable)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "exp_mult", "weight_decay")})
        check_positive(step_mult=group["step_mult"])
        _check_decay(float(group["lr"]), group)
        if group["max_grad_norm"] is not None:
            check_positive(max_grad_norm=group["max_grad_norm"])
        if group["chunk"] is not None:
            check_count(chunk=group["chunk"])

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """Refuses gradients that are not finite, and clips each tensor's own where that is asked for. A rate that has
        risen too far beside weight_decay is refused too, but for one that is a tensor, which would be waited for.
        """
        for group, _ in leaves:
            if not isinstance(group["lr"], Tensor):
                try:
                    _check_decay(group["lr"], group)
                except InputError:
                    self.uncount(leaves)
                    raise
        every = [(leaf, group["max_grad_norm"]) for group, each in leaves for leaf in each]
        norms = _norms([leaf for leaf, _ in every])
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().tolist() if norms else []
        for (leaf, _), fine in zip(every, finite, strict=True):
            if not fine:
                self.uncount(leaves)
                raise InputError(
                    f"the gradient of {leaf.name} must be finite, and so must the sum of its squares in "
                    f"{leaf.g.dtype}: skip such steps, as torch.amp.GradScaler does; nothing has moved"
                )
        for (leaf, most), norm in zip(every, norms, strict=True):
            if most is not None:
                leaf.g = leaf.g * (most / (norm + 1e-6)).clamp(max=1.0)

    def forms(self, group: dict[str, Any]) -> tuple[Callable[..., Rule], Callable[..., Rule] | None]:
        """The rule alone."""
        return small_fc_lopt_, None

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Zeros: of a matrix `momenta`, `rms`, `row` and `column`, of a vector `momenta`, `rms` and `second`."""
        state = {"momenta": _stacked_zeros(parameter), "rms": _stacked_zeros(parameter, 0)}
        dims = factored_dims(parameter.shape)
        if dims is None:
            return state | {"second": _stacked_zeros(parameter)}
        return state | {"row": _stacked_zeros(parameter, one=dims[1]), "column": _stacked_zeros(parameter, one=dims[0])}

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of `small_fc_lopt_`, what is factored in the last two dimensions."""
        dims, shape = factored_dims(leaf.shape), leaf.shape
        averages = (leaf.state["second"],) * 2 if dims is None else (leaf.state["row"], leaf.state["column"])
        tensors: tuple[Tensor, ...] = (leaf.w, leaf.g, leaf.state["momenta"], leaf.state["rms"], *averages)
        if dims is not None:
            places = (dims[0] - len(shape), dims[1] - len(shape))
            tensors = tuple(each.movedim(places, (-2, -1)) for each in tensors)
        elif not shape:
            tensors = tuple(each.unsqueeze(-1) for each in tensors)
        return (*tensors, _time(leaf.t - 1, leaf.w.dtype, leaf.w.device), *self._theta(leaf.w))

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `small_fc_lopt_`."""
        dims, shape, spread = factored_dims(leaf.shape), leaf.shape, leaf.layout.mesh is not None
        block = BLOCK.get(leaf.w.device.type, 1 << 20)
        whole = bool(group["fused"]) and not spread
        numbers = {name: group[name] for name in ("lr", "step_mult", "exp_mult", "weight_decay")}
        numbers["sizes"] = (shape.numel(), *(() if dims is None else (shape[dims[0]], shape[dims[1]])))
        numbers["dims"] = dims if spread or dims is None else (-2, -1)
        return numbers | {"chunk": None if whole else group["chunk"] or block, "block": None if whole else block}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; a state that other weights made is refused."""
        for group in state_dict["param_groups"]:
            if group.get("weights_digest", self.weights.digest) != self.weights.digest:
                raise InputError(
                    f"the state must be of the weights at hand ({self.weights.digest}), got one of "
                    f"{group['weights_digest']}: give LearnedOptimizer the weights it was saved with"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"weights": self.weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._placed = {}

    def _theta(self, like: Tensor) -> tuple[Tensor, ...]:
        """The seven decays and the layers where and as a tensor is."""
        key = (like.device, like.dtype)
        if key not in self._placed:
            decays = OptimizerWeights((), self.weights.deltas.to("cpu", torch.float64)).betas()
            self._placed[key] = tuple(each.to(like.dtype).to(like.device) for each in (decays, *self.weights.layers))
        return self._placed[key]


@lru_cache(maxsize=64)
def _time(t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`time_features`, one tensor for all that are at that step: nobody may change it."""
    return torch.tensor(time_features(t), dtype=dtype, device="cpu").to(device, non_blocking=True)


def _average(average: Tensor, beta: Tensor, new: Tensor) -> None:
    """β·average + (1 - β)·new, in place."""
    average.lerp_(new, 1 - beta)


def _check_decay(lr: float, group: Mapping[str, Any]) -> None:
    if lr * group["weight_decay"] >= 1:
        raise InputError(
            "weight_decay must be below 1/lr, for lr·weight_decay of each weight goes at each step: got "
            f"weight_decay={group['weight_decay']!r} with lr={group['lr']!r}; 1e-5 is a usual order"
        )


def _norms(leaves: Sequence[Leaf]) -> list[Tensor]:
    """|g| of each whole tensor."""
    sums = sums_over([Sum(leaf.g.square().sum()) for leaf in leaves], [leaf.layout for leaf in leaves])
    return [each.sqrt() for each in sums]


def _stacked_zeros(parameter: Tensor, count: int = 3, *, one: int | None = None) -> Tensor:
    """Zeros of shape (count, *parameter.shape), with 1 in place of dimension `one`, spread as the parameter is.

    count: 0 for no such first dimension. What is 1 in a dimension that ranks cut, they all hold.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    lead = [count] if count else []

    def shape_of(whole: torch.Size) -> list[int]:
        return lead + [1 if d == one else n for d, n in enumerate(whole)]

    part = share(parameter.detach()).part
    local = torch.zeros(shape_of(part.shape), dtype=dtype, device=part.device)
    if not is_spread(parameter):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    spread = cast(Any, parameter)
    placements = [
        Replicate() if each.is_replicate() or each.dim % parameter.ndim == one else _behind(each, parameter, len(lead))
        for each in spread.placements
    ]
    shape = torch.Size(shape_of(parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, device_mesh=spread.device_mesh, placements=placements, run_check=False, shape=shape, stride=stride
    )


def _behind(placement: Any, parameter: Tensor, lead: int) -> Any:
    """The same cut of a tensor with one more dimension in front."""
    dim = placement.dim % parameter.ndim + lead
    if hasattr(placement, "split_factor"):  # tensor parallelism beneath FSDP on one dimension
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)
