"""MKOR: K-FAC whose inverse factors are kept by rank-one updates, before any base optimizer (arXiv 2306.01685)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchlab.core.checks import check_count, check_inside, check_positive, check_share, holds, is_count
from batchlab.core.errors import InputError
from batchlab.optim.by_name import in_groups
from batchlab.optim.leaf import checkpoint_calls
from batchlab.optim.mkor.factors import Knee, Variant, input_sums, output_sum, wide_dtype
from batchlab.optim.mkor.layers import Layer, all_finite, layers_of, mean_over_ranks, over_ranks
from batchlab.optim.state_hooks import loads, saves
from batchlab.parallel.shards import is_spread

_SETTINGS = ("gamma", "inv_freq", "warmup_steps", "eps", "zeta", "variant", "switch")


class LayerReport(NamedTuple):
    """mean_share: |ā|²/mean|a|² of the last update, the bias's 1 left out, in [0, 1]; NaN before the first.

    Near 0, as after a normalisation layer, ā says nothing of the inputs, and A⁻¹ does nothing. input_norm,
    output_norm: the largest entries of A⁻¹ and G⁻¹, which stand on the diagonal. updates: rank-one updates so far.
    stabilised: of how many of the 2·updates rank-one updates the factor was drawn to I first, or the vector shortened;
    in the released variant, how often a factor was set to I.
    """

    name: str
    mean_share: float
    input_norm: float
    output_norm: float
    updates: int
    stabilised: int


class MKOR(torch.optim.Optimizer):
    """Preconditions the gradients of `model`'s Linear and Conv2d layers, then steps `base`.

    Of a layer with weight W (out, in), its bias taken as the weight of one more input that is 1, input rows a_n and
    gradients g_n of its output rows, every `inv_freq` steps (and at each of the first `warmup_steps`):

        ā = mean of a_n;  ḡ = mean of N·g_n = Σ g_n             over the N rows: examples x tokens or positions
        A⁻¹ ← (γA + (1-γ)āāᵀ)⁻¹;  G⁻¹ ← (γG + (1-γ)ḡḡᵀ)⁻¹       Sherman-Morrison, O(d²), both start at I

    and at every step ∇ ← D·‖∇‖/‖D‖ with D = G⁻¹∇A⁻¹, in place in `.grad`, for `base` to use. Norms of layers stay, so
    that clipping before the step works as before.

    base: over `model`'s parameters; `param_groups`, `state` and `defaults` are its own, schedulers may be given either.
    Layers whose weight it does not hold, other kinds and those in `ignore` are left to it: see `left_to_base`.
    gamma: γ, 0.95 as in the released package. inv_freq: 10, its default and that of the BERT runs. warmup_steps: 0,
    its default. eps, zeta: where the largest entry of a factor is above ε, P ← ζP + (1-ζ)I before its update;
    published without values, 0.9 is the package's and 10 is batchlab's. ε = infinity: never. factor_dtype: what the
    factors are stored in; arithmetic is in float32 or better. In half precision ā and ḡ are often longer than it can
    hold, and shortened: see `update_inverse_`. variant: "exact"; "released", what the package `mkor` 0.1.2 does, less
    its division of ḡ by the count of micro-batches; "printed", the listing's update, for comparison only: it grows
    without bound. switch: MKOR-H, to step `base` alone for good and free the factors: after so many steps, or "knee",
    when the loss given to `observe` (or a closure's) stops paying, see `Knee`. ignore: layers by name or themselves; a
    container stands for all in it. process_group: the data-parallel ranks; torch's default group if None.

    The loss must be a mean, for ḡ. Several backward passes before a step, calls of one layer and ranks count by their
    rows: ā is the mean of all rows, ḡ a sum over passes and a mean over ranks, as the gradient is. All backward passes
    through a layer count, forward passes without one do not. With `GradScaler` set `loss_scale` to its `get_scale()`
    before each backward pass; after a step that it skips call `zero_grad` of this optimizer, not of the model, so that
    what the pass left is forgotten. An ā or ḡ that is not finite leaves both factors of its layer as they are; a
    gradient that is not goes to `base` as it is.

    State: per layer (in + 1)² + out² elements, the same on every rank. Sent: in + out + 2 numbers a layer, once an
    update. Gradients may be DTensors (FSDP2): each layer's is gathered, preconditioned and cut again, on every rank.

    When not: a layer fed with zero-mean inputs (`report`), a very wide one (a vocabulary: ignore it), few rows a step
    (D costs (in + out)/(3N) of the layer's passes), a model compiled before this is made (its hooks are not seen).

    Raises `InputError` for settings out of range, a base that needs a closure, is differentiable or takes gradients in
    groups, a model without a layer to precondition, and gradients that are sparse, complex or sums still to be taken
    over ranks.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> [(row.name, round(row.mean_share, 2), row.updates) for row in optimizer.report()]
    [('', 1.0, 1)]
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        gamma: float = 0.95,
        inv_freq: int = 10,
        warmup_steps: int = 0,
        eps: float = 10.0,
        zeta: float = 0.9,
        factor_dtype: torch.dtype = torch.float32,
        variant: Variant = "exact",
        switch: Literal["none", "knee"] | int = "none",
        ignore: Collection[str | nn.Module] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _check_base(base)
        if factor_dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(f"factor_dtype must be a floating-point dtype of torch, got {factor_dtype!r}")
        self.base, self._linked, self.second_order = base, False, True
        self.gamma, self.inv_freq, self.warmup_steps = gamma, inv_freq, warmup_steps
        self.eps, self.zeta, self.variant, self.switch = eps, zeta, variant, switch
        self._check_settings()
        self.loss_scale, self.steps = 1.0, 0
        self._dtype, self._group, self._knee, self._observed = wide_dtype(factor_dtype), process_group, Knee(), False
        self._layers, self._others = layers_of(model, ignore, factor_dtype)
        super().__init__(base.param_groups, base.defaults)
        self._link()
        if not any(id(layer.weight) in self._held for layer in self._layers):
            raise InputError(f"model and base share no layer to precondition; left to base: {self.left_to_base}")
        self._handles = _attach(self)
        weakref.finalize(self, _remove, self._handles)

    def _check_settings(self) -> None:
        check_inside(gamma=self.gamma)
        check_count(inv_freq=self.inv_freq)
        check_count(0, warmup_steps=self.warmup_steps)
        if not holds(lambda eps: eps > 0, self.eps):
            raise InputError(f"eps must be > 0, infinity for never, got {self.eps!r}")
        check_share(zeta=self.zeta)
        if self.variant not in get_args(Variant):
            raise InputError(f"variant must be one of {sorted(get_args(Variant))}, got {self.variant!r}")
        if self.switch not in ("none", "knee") and not is_count(self.switch):
            raise InputError(f'switch must be "none", "knee" or a number of steps of at least 1, got {self.switch!r}')

    def _link(self) -> None:
        """The base's groups and state are this optimizer's own."""
        self.param_groups, self.state, self._linked = self.base.param_groups, self.base.state, True
        self._held = {id(p) for group in self.param_groups for p in group["params"]}

    @property
    def left_to_base(self) -> dict[str, str]:
        """The modules with parameters that are not preconditioned, and why."""
        reasons = dict(self._others)
        for layer in self._layers:
            if id(layer.weight) not in self._held:
                reasons[layer.name] = "its weight is not in base"
            elif not layer.weight.requires_grad:
                reasons[layer.name] = "its weight is frozen"
        return reasons

    def _due(self) -> bool:
        return self.second_order and (self.steps % self.inv_freq == 0 or self.steps < self.warmup_steps)

    def _see(self, layer: Layer, module: nn.Module, x: Any, output: Any) -> None:
        """After a forward pass of a layer: its sums are taken in when the backward pass comes."""
        if not (self._due() and torch.is_grad_enabled() and module is layer.module and id(layer.weight) in self._held):
            return
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            return
        if is_spread(x) or is_spread(output):
            raise InputError(f"layer {layer.name!r} is called with DTensors (tensor parallel): put it in ignore")
        check_positive(loss_scale=self.loss_scale)
        clipped, scale, dtype = self.variant == "released", self.loss_scale, self._dtype
        inputs = input_sums(module, x.detach(), dtype, clipped=clipped)

        def add(g: Tensor) -> None:
            layer.add(inputs, output_sum(module, g.detach(), dtype, clipped=clipped, scale=scale))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def observe(self, loss: float | Tensor) -> None:
        """For switch="knee": the loss of the coming step, a mean over its examples; then a mean over the ranks.

        Waits for the device, and has all ranks call. A closure's loss is observed by `step`.
        """
        value = torch.as_tensor(loss).detach().cpu().double()
        self._observed = True
        if self.second_order and self._knee.take(mean_over_ranks(value, self._layers[0].weight.device, self._group)):
            self._fall_back()

    def _fall_back(self) -> None:
        self.second_order = False
        for layer in self._layers:
            layer.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the factors where due, preconditions `.grad` and steps the base; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif checkpoint_calls():
            return self.base.step()
        self._link()
        if self.second_order:
            self._watch(loss)
        if self.second_order:
            if self._due():
                self._update()
            for layer in self._layers:
                if id(layer.weight) in self._held:
                    layer.precondition(self._held, variant=self.variant)
        self.base.step()
        self.steps += 1
        return loss

    def _watch(self, loss: Any) -> None:
        """MKOR-H: whether this step is the base's alone."""
        if self.switch == "knee":
            if loss is not None:
                self.observe(loss)
            if not self._observed:
                raise InputError('switch="knee" needs the loss: call observe(loss) before step, or give it a closure')
            self._observed = False
        elif is_count(self.switch) and self.steps >= int(self.switch):
            self._fall_back()

    def _update(self) -> None:
        passes = over_ranks([layer.take() for layer in self._layers], self._group)
        if not any(each.inputs.rows for each in passes) and any(layer.has_gradient() for layer in self._layers):
            raise InputError(
                "no pass through a layer was seen, but there are gradients: make MKOR before torch.compile, and before "
                "the forward pass of the step"
            )
        for layer, each, finite in zip(self._layers, passes, all_finite(passes), strict=True):
            if finite:
                layer.update(each, gamma=self.gamma, eps=self.eps, zeta=self.zeta, variant=self.variant)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets what backward passes told of gradients that are not stepped with."""
        for layer in self._layers:
            layer.drop()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the base; layers of the model whose weights come with it are preconditioned from then on."""
        if self._linked:
            self.base.add_param_group(param_group)
            self._link()
        else:
            super().add_param_group(param_group)

    def report(self) -> list[LayerReport]:
        """A row for each layer that the base holds; waits for the device."""
        return [
            LayerReport(
                layer.name,
                float(layer.mean_share),
                1.0 if layer.A is None else float(layer.A.diagonal().max()),
                1.0 if layer.G is None else float(layer.G.diagonal().max()),
                layer.updates,
                int(layer.stabilised),
            )
            for layer in self._layers
            if id(layer.weight) in self._held
        ]

    def close(self) -> None:
        """Takes the hooks off and frees the factors; `step` is the base's from then on."""
        _remove(self._handles)
        self._fall_back()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("MKOR cannot be copied or pickled, it has hooks on a model: use state_dict")

    @saves
    def state_dict(self) -> dict[str, Any]:
        """The base's, and under "mkor" the settings, the count of steps and the layers' factors by name.

        Between a backward pass and its step it does not hold what that pass told.
        """
        own: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
        own |= {"steps": self.steps, "second_order": self.second_order, "knee": self._knee.state_dict()}
        own["layers"] = {layer.name: layer.state_dict() for layer in self._layers}
        return {**self.base.state_dict(), "mkor": own}

    @loads
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, settings too; the world size may be another."""
        if "mkor" not in state_dict:
            raise InputError("state_dict has no 'mkor': give one of a base alone to base.load_state_dict")
        own, names = state_dict["mkor"], {layer.name for layer in self._layers}
        if differing := sorted(names ^ set(own["layers"])):
            raise InputError(f"state_dict must be of the same layers, not in both are {differing}")
        for layer in self._layers:
            layer.check_state(own["layers"][layer.name])
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "mkor"})
        self._link()
        for layer in self._layers:
            layer.load_state_dict(own["layers"][layer.name])
        for name in (*_SETTINGS, "steps", "second_order"):
            setattr(self, name, own[name])
        self._check_settings()
        self._knee.load_state_dict(own["knee"])


def _check_base(base: Any) -> None:
    if not isinstance(base, torch.optim.Optimizer):
        raise InputError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, torch.optim.LBFGS):
        raise InputError("base must step without a closure, got LBFGS")
    if any(group.get("differentiable") for group in base.param_groups):
        raise InputError("base must have differentiable=False: gradients are preconditioned in place")
    if in_groups(base):
        raise InputError(
            f"base must take its gradient from .grad, got {type(base).__name__}, which takes it in groups: give a "
            "plain base, and finish() a VRGradient of it before each step"
        )


def mkor_sgd(
    params: Any,
    model: nn.Module,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    gamma: float = 0.95,
    inv_freq: int = 10,
    eps: float = 10.0,
    zeta: float = 0.9,
    switch: Literal["none", "knee"] | int = "none",
    process_group: dist.ProcessGroup | None = None,
) -> MKOR:
    """`MKOR` before torch's SGD over params, parameters of `model`; settings as of the two."""
    base = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    settings: dict[str, Any] = {"gamma": gamma, "inv_freq": inv_freq, "eps": eps, "zeta": zeta, "switch": switch}
    return MKOR(model, base, **settings, process_group=process_group)


def _attach(optimizer: MKOR) -> list[RemovableHandle]:
    """Hooks that do not keep the optimizer alive: one that is dropped leaves its model as it was."""
    me = weakref.ref(optimizer)

    def hook_of(layer: Layer) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (mkor := me()) is not None:
                mkor._see(layer, module, args[0] if args else kwargs.get("input"), output)

        return see

    def link(_: torch.optim.Optimizer) -> None:
        if (mkor := me()) is not None:
            mkor._link()

    handles = [layer.module.register_forward_hook(hook_of(layer), with_kwargs=True) for layer in optimizer._layers]
    return [*handles, optimizer.base.register_load_state_dict_post_hook(link)]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
