"""DiLoCo: replicas that train alone for H steps and then meet in one outer step (Douillard et al. 2023).

    Δ_m = θ(t-H) - θ_m,    Δ = mean over replicas of Δ_m,    v ← μv + Δ,    θ ← θ(t-H) - η(Δ + μv),    θ_m ← θ

θ_m: the weights of replica m, moved by its inner optimizer. η `outer_lr`, μ `outer_momentum`: constants of the outer
step, which is `torch.optim.SGD` itself, fed Δ as its gradient. One exchange of as many bytes as the weights have in
float32 takes the place of H exchanges of gradients. Form and constants: Charles et al. 2025 (arXiv 2503.09799), after
arXiv 2311.08105. With one replica, μ = 0 and η < 1 it is Lookahead (Zhang et al. 2019): within 2e-16 of
pytorch_optimizer 4.1.0's after 40 steps of AdamW in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_positive, check_truth, holds, is_count
from batchlab.core.errors import BatchlabError, InputError, NonFiniteError
from batchlab.optim.by_name import in_groups
from batchlab.optim.diloco.outer import CommonWeights, check_real, check_state, named_parameters, part_of, wide
from batchlab.optim.diloco.replicas import Replicas, clip_, floating, in_buckets, over_shards
from batchlab.optim.leaf import checkpoint_calls
from batchlab.optim.state_hooks import attributes_of_a_copy, loads, saves
from batchlab.parallel.agree import device_of

COUNTS = ("position", "rounds", "steps", "bytes_sent")
OUTER_LR = {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}  # read off the figure's grid of 0.2, 0.4 ... 1.0


def outer_learning_rate(replicas: int) -> float:
    """The best constant η for M replicas at H = 30 and μ = 0.9 (Charles et al. 2025).

    Best of a grid of 0.2 for language models of 335M to 2.4B weights, where it did not move with their size; smaller
    ones were less clear. It grows with H. Other M were not tried and are refused.

    >>> [outer_learning_rate(m) for m in (1, 2, 4, 8)]
    [0.4, 0.6, 0.6, 0.8]
    """
    check_count(replicas=replicas)
    if replicas not in OUTER_LR:
        raise InputError(
            f"replicas must be one of {tuple(OUTER_LR)}, for which the source has a best rate, got {replicas!r}: "
            "try outer rates of 0.4 to 1.0"
        )
    return OUTER_LR[replicas]


def pseudo_gradient(theta: Tensor, weights: Tensor) -> Tensor:
    """Δ_m = θ(t-H) - θ_m in θ's type: old less new, so that an optimizer that subtracts follows the replica.

    θ is rounded to the type of θ_m first, as it was when the replica set out: weights that stayed have Δ_m = 0.

    >>> pseudo_gradient(torch.tensor([1.0]), torch.tensor([0.25]))
    tensor([0.7500])
    """
    return theta.to(weights.dtype).to(theta.dtype) - weights.to(theta.dtype)


class DiLoCo(torch.optim.Optimizer):
    """Wraps the optimizer of one replica: every `inner_steps`-th step ends in an outer step with the other replicas.

    inner: steps this replica on the mean gradient of its own share of the batch, 1/M of it; its state is neither
        reset nor averaged. `param_groups` and `state` are its own: schedulers are put on either of the two.
    inner_steps: H. The source has 30; 1 was its worst.
    outer_lr: η, constant in the source; `outer_learning_rate` has its best by M. A scheduler may be put on `outer`.
    outer_momentum, nesterov: μ and the form above; the source's 0.9 and True. Without momentum both forms are one.
    process_group: one rank of each replica, and of each shard if a replica is sharded: of a mesh ("replica", "shard")
        it is `mesh["replica"].get_group()`, while FSDP2 has `mesh["shard"]`. Δ is its mean. None: one replica alone,
        whatever else runs. It is never made here, and belongs to the caller.
    clip_norm: the global norm that each replica's gradient is clipped to before an inner step (the source: 1.0);
        None where the loop clips itself. Δ is not clipped.
    buffers: running statistics that the replicas average, as `model.buffers()`; the weights tested after an outer
        step are common, and so should those be. Of variances it is the mean within replicas, without that between
        them. Integers are left alone, and so are all buffers unless given: leave out constants such as masks.

    With a group, weights and buffers begin as those of its first rank (as in DDP), and every rank must construct.
    Memory: θ and v in float32 (float64 of float64 weights), 8 bytes a weight, and 4 more during an outer step. Frozen
    parameters (`requires_grad` False) take no memory and are not sent until they are unfrozen, which must happen on
    all replicas at one step; those that are frozen later lose v, so that they stay, and are sent on. Sent: one copy of
    the weights in θ's type an outer step, counted in `bytes_sent`.

    `position`: inner steps since the last outer one. `rounds`: outer steps. `steps`: inner steps in all. Let the
    number of steps be a multiple of H or end with `synchronize()`; test the model right after an outer step, or inside
    `global_weights()`.

    A Δ that is NaN or infinite on any replica raises `NonFiniteError` on all of them before θ or v moves; `rewind()`
    then goes back to θ(t-H). A collective that fails moves nothing either. When a replica dies, the others' outer step
    raises: destroy the old group (so that all of them notice), make a new one, then `set_process_group`, `join()` and
    `synchronize()` on each. A new replica is made without a group and calls the same. Checked on gloo.

    Not for links between replicas as fast as those within one, where the mean gradient costs little and learns a
    little better than two replicas or more. Not with a `GradScaler`: a step that it skips on one replica puts the
    replicas out of step; use bfloat16.

    Raises `InputError` for arguments out of range, for settings or sizes that differ between ranks, for complex and
    meta weights; of sparse gradients with clip_norm, else they are the inner optimizer's to take or refuse.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), inner_steps=2, outer_lr=0.5, outer_momentum=0)
    >>> for _ in range(2):
    ...     model.weight.grad = torch.ones_like(model.weight)
    ...     optimizer.step()
    >>> round(model.weight.item(), 9), optimizer.rounds  # the replica went to 0.8, η is a half
    (0.9, 1)
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        inner_steps: int,
        outer_lr: float,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        process_group: dist.ProcessGroup | None = None,
        clip_norm: float | None = None,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        check_count(inner_steps=inner_steps)
        check_positive(outer_lr=outer_lr, **({} if clip_norm is None else {"clip_norm": clip_norm}))
        if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, DiLoCo):
            raise InputError(f"inner must be the torch.optim.Optimizer of one replica, got {type(inner).__name__}")
        check_truth(nesterov=nesterov)
        if not holds(lambda momentum: 0 <= momentum < 1, outer_momentum):
            raise InputError(f"outer_momentum must lie in [0, 1), got {outer_momentum!r}")
        if any(group.get("differentiable") for group in inner.param_groups):
            raise InputError("inner must have differentiable=False: nothing is differentiated through an outer step")
        if clip_norm is not None and in_groups(inner):
            raise InputError(
                f"clip_norm must be None where inner takes its gradient in groups, as {type(inner).__name__} does, got "
                f"{clip_norm!r}: clip after its finish(), before step()"
            )
        self.inner, self.inner_steps, self.clip_norm = inner, inner_steps, clip_norm
        self.position = self.rounds = self.steps = self.bytes_sent = 0
        self.defaults = inner.defaults
        self.__setstate__({})  # the base class's __init__ would make groups and a state of its own
        self._buffers = floating(buffers)
        self._common = CommonWeights(lr=outer_lr, momentum=outer_momentum, nesterov=nesterov)
        self.outer = self._common.sgd
        self.set_process_group(process_group)
        self._check_alike(outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov)
        self._replicas.broadcast([*self._frozen(), *self._buffers], 0)
        self._adopt()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's, by parameter; θ and v are in `state_dict()["diloco"]`."""
        return self.inner.state

    @property
    def replicas(self) -> int:
        """M, the size of the group; 1 without one."""
        return self._replicas.size

    def set_process_group(self, group: dist.ProcessGroup | None) -> None:
        """From here on, the replicas of `group`. Local, nothing moves; where one may be new or behind, `join()` next.

        η is left as it is: the best one falls with fewer replicas (`outer_learning_rate`).
        """
        replicas = Replicas(group)
        replicas.check_apart(self._weights())
        self._replicas = replicas

    def __getstate__(self) -> dict[str, Any]:
        return attributes_of_a_copy(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the inner optimizer's, on every replica at one step: the new weights begin as the group's first rank's."""
        self.inner.add_param_group(param_group)
        self._adopt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer's."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One inner step, and the outer step if it was the H-th; returns the inner optimizer's loss.

        Where torch.distributed.checkpoint asks for a state that is not there yet, it is made and no step counted.
        """
        if closure is None and checkpoint_calls():
            return self.inner.step()
        self._adopt()
        if closure is None:
            self._clip()
            loss = self.inner.step()
        else:
            loss = self.inner.step(self._clipped(closure))
        self.position += 1
        self.steps += 1
        if self.position >= self.inner_steps:
            self._outer_step()
        return loss

    def synchronize(self) -> None:
        """An outer step now, if any replica has moved since the last one: for the tail of a run, or after `join()`.

        Every rank of the group must call.
        """
        if self._replicas.largest(self.position):
            self._outer_step()

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to θ(t-H): every replica must, after `NonFiniteError`. Buffers and the inner state stay.

        A replica whose own Δ was bad must also mend its inner state (`optimizer.state.clear()`): NaN stays in it.
        """
        for held, theta in self._trained():
            held.copy_(theta)
        self.position = 0

    @contextlib.contextmanager
    def global_weights(self) -> Iterator[None]:
        """Inside, the parameters hold θ(t-H), the weights all replicas share; the replica's own come back after it.

        For a test or a copy of the model in the middle of a round. Takes one more copy of the weights.
        """
        trained = self._trained()
        own = [held.clone() for held, _ in trained]
        for held, theta in trained:
            held.copy_(theta)
        try:
            yield
        finally:
            for (held, _), kept in zip(trained, own, strict=True):
                held.copy_(kept)

    @torch.no_grad()
    def join(self, source: int | None = None) -> bool:
        """Brings new replicas, and those that an outer step passed by, to where `source` is: every rank must call.

        source: a rank within the group; by default the first of those with the most outer steps. A replica whose θ, v
        and `rounds` differ takes them, outer rate, buffers and frozen weights, begins at θ(t-H) and is at the
        source's `position`: it counts as a whole replica at the next outer step, so join soon after one. All others
        keep what they have. Returns whether this rank took over: its own stream of data and inner schedule are the
        caller's (`steps` says where they are). A new replica's inner state is new.
        """
        replicas = self._replicas
        if replicas.group is None:
            raise InputError("join needs a process group: give it to set_process_group first")
        if source is not None and not (is_count(source, 0) and source < replicas.size):
            raise InputError(f"source must be a rank of the group, 0 to {replicas.size - 1}, got {source!r}")
        self._adopt(alone=True)
        self._check_alike()
        source = replicas.newest(self.rounds) if source is None else source
        outer = self.outer.param_groups[0]
        where = [self.rounds, self.position, self.steps, float(outer["lr"]), outer["momentum"], outer["nesterov"]]
        told = torch.tensor(where, dtype=torch.float64, device=device_of(replicas.group))
        thetas = [theta for _, theta in self._trained()]
        common = [*thetas, *map(self._common.velocity, thetas)]
        held = [*common, *self._frozen(), *self._buffers]
        received = [each.clone() for each in held]
        replicas.broadcast([told, *received], source)
        differs = self.rounds != told[0] or not all(map(torch.equal, common, received))
        if not over_shards(self._weights(), bool(differs))[0]:
            return False
        for mine, theirs in zip(held, received, strict=True):
            mine.copy_(theirs)
        self.rewind()
        self.rounds, self.position, self.steps = (int(number) for number in told[:3])
        outer.update(lr=float(told[3]), momentum=float(told[4]), nesterov=bool(told[5]))
        return True

    @saves
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and under "diloco" θ, v (by parameter, in the order of the groups) and the counts.

        θ and v are the same on all replicas, the rest of the state is each one's own: save it on every replica, or on
        one and let the others begin with its moments. Goes into any number of replicas. Save this, and not what
        torch.distributed.checkpoint's `get_optimizer_state_dict` makes of it, which has no room for θ and v.
        """
        counts = {name: getattr(self, name) for name in COUNTS}
        return self.inner.state_dict() | {"diloco": self._common.state(self._named()) | counts}

    @loads
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; the model's weights are loaded by the model. Nothing is exchanged."""
        if "diloco" not in state_dict:
            raise InputError('state_dict must be of DiLoCo (no "diloco" in it): load a plain one into `inner` instead')
        saved, named = state_dict["diloco"], self._named()
        check_state(named, saved)
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "diloco"})
        self._common.load(named, saved)
        for name in COUNTS:
            setattr(self, name, saved[name])

    def _named(self) -> list[tuple[str, Tensor]]:
        return named_parameters(self.param_groups)

    def _trained(self) -> list[tuple[Tensor, Tensor]]:
        return self._common.pairs(self._named())

    def _weights(self) -> list[Tensor]:
        return [p for _, p in self._named()]

    def _frozen(self) -> list[Tensor]:
        return [part_of(p) for p in self._weights() if p not in self._common and not p.requires_grad]

    def _check_alike(self, **settings: float) -> None:
        sizes = [(part_of(p).numel(), p in self._common or p.requires_grad) for p in self._weights()]
        counts = {"weights": sum(n for n, _ in sizes), "trained weights": sum(n for n, trained in sizes if trained)}
        counts |= {"parameters": len(sizes), "buffers": len(self._buffers)}
        self._replicas.check_alike(inner_steps=self.inner_steps, **counts, **settings)

    @torch.no_grad()
    def _adopt(self, *, alone: bool = False) -> None:
        """θ of parameters that are new or newly trained, as the group's first rank has them; `alone`, as they are."""
        new = [(name, p) for name, p in self._named() if p.requires_grad and p not in self._common]
        for name, p in new:
            check_real(name, p)
        self._replicas.check_apart(p for _, p in new)
        if not alone:
            self._replicas.broadcast([part_of(p) for _, p in new], 0)
        for _, p in new:
            self._common.of(p)

    def _clipped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with its gradient clipped before the inner optimizer sees it."""

        def clipped() -> Any:
            loss = closure()
            self._clip()
            return loss

        return clipped

    def _clip(self) -> None:
        if self.clip_norm is not None:
            clip_(self._named(), self.clip_norm)

    @torch.no_grad()
    def _outer_step(self) -> None:
        trained, averaged = self._trained(), self._buffers if self.replicas > 1 else []
        weights, thetas = [held for held, _ in trained], [theta for _, theta in trained]
        flats, views = in_buckets([*thetas, *(buffer.to(wide(buffer)) for buffer in averaged)])
        for view, (held, theta) in zip(views, trained, strict=False):
            view.copy_(pseudo_gradient(theta, held))
        for view, buffer in zip(views[len(thetas) :], averaged, strict=True):
            view.copy_(buffer)
        self._mean(flats)
        self._common.stop(self._named())
        self._common.move(thetas, views[: len(thetas)])
        for held, common in zip([*weights, *averaged], [*thetas, *views[len(thetas) :]], strict=True):
            held.copy_(common)
        self.position = 0
        self.rounds += 1

    def _mean(self, flats: Sequence[Tensor]) -> None:
        """The mean over replicas, in place, of what is finite on all; else the same error on all, with nothing moved.

        The ranks of one sharded replica agree on it, so that none moves its shard alone.
        """
        failed, sent = None, 0
        try:
            sent = self._replicas.mean_(flats)
        except RuntimeError as error:  # a replica was lost
            failed = error
        finite = failed is not None or all(bool(flat.isfinite().all()) for flat in flats)
        lost, bad = over_shards(self._weights(), failed is not None, not finite)
        if failed is not None:
            raise failed
        if lost:
            raise BatchlabError("another shard of this replica lost touch with the other replicas: nothing was moved")
        if bad:
            raise NonFiniteError(
                f"the mean of the replicas is NaN or infinite in outer step {self.rounds + 1}; {self._own_fault()}. "
                "Nothing was moved: rewind() on every replica goes back to the last outer step"
            )
        self.bytes_sent += sent

    def _own_fault(self) -> str:
        for name, p in self._named():
            if p in self._common and not part_of(p).isfinite().all():
                return f"{name} is so on this one, whose inner state must be mended too"
        for index, buffer in enumerate(self._buffers):
            if not buffer.isfinite().all():
                return f"buffers[{index}] is so on this one"
        return "this one's own weights are finite"
