"""A step that holds collectives, run on all ranks at once so that a rank that fails lets the others go.

Where one rank runs out of memory in the middle of a step that gathers or reduces, as those of DDP and FSDP do, the
others wait for it in the next collective for ever. Here every collective is preceded by a vote: a rank that has failed
votes no, and then all leave the step. Memory runs out on the host, where it is asked for, also for work that a GPU does
later: once all have voted yes, all of them launch the collective, and it ends.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.utils._python_dispatch import TorchDispatchMode

from batchlab.core.errors import BatchlabError

TIMEOUT = timedelta(minutes=30)  # as that of any group of torch: what one rank may be slower than another
_NO_COLLECTIVES = {"wait_tensor", "_wrap_tensor_autograd"}
_END = 0
_made: Counter[tuple[int, ...]] = Counter()

Result = TypeVar("Result")


class PeerFailed(Exception):
    """Another rank failed in the step that all ran: this one left it at its next collective."""


class Lockstep:
    """Runs functions that hold collectives on all ranks of `group`, the default one if None.

    The ranks must issue the same collectives in the same order, as data and tensor parallel ones do, and those of a
    pipeline do not; where they differ, all raise `BatchlabError` rather than wait. A failure inside a collective
    itself, as of a library that allocates there, is not caught: the time-out of the group ends that one.
    Votes go over a gloo backend of its own, on the host, that only these ranks need to make and that ends with this
    object; one takes about as long as a small all-reduce.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        _made[ranks] += 1  # the same on all of them, so that no two meet under one name
        name = f"batchlab/lockstep/{'-'.join(map(str, ranks))}/{_made[ranks]}"
        store = PrefixStore(name, _get_default_store())
        self._votes = dist.ProcessGroupGloo(store, dist.get_rank(group), len(ranks), TIMEOUT)
        self._verdict: Exception | None = None

    def run(self, function: Callable[..., Result], *given: Any) -> Result:
        """What `function(*given)` returns. Where it raises on some rank, that one raises it, the others `PeerFailed`.

        After a failure nothing that took part may be used again: DDP and FSDP are then in the middle of a step.
        """
        self._verdict = None
        try:
            with _Voting(self._vote):
                result = function(*given)
        except Exception:
            if self._verdict is None:
                self.most(1.0, _END, -_END)
                raise
        else:
            self._vote(_END)
            return result
        raise self._verdict

    def most(self, *values: float) -> list[float]:
        """The largest of the ranks' values, place by place."""
        tensor, options = torch.tensor(values, dtype=torch.float64, device="cpu"), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._votes.allreduce([tensor], options).wait()  # type: ignore[attr-defined]
        return list(tensor.tolist())

    def _vote(self, code: int) -> None:
        """Before a collective, or at the end. Raises once any rank has failed, and then each time."""
        if self._verdict is None:
            failed, most, least = self.most(0.0, code, -code)
            if failed:
                self._verdict = PeerFailed("another rank failed in this step")
            elif most != -least:
                text = "the ranks do not issue the same collectives in the same order in this step"
                self._verdict = BatchlabError(text)
        if self._verdict is not None:
            raise self._verdict


class _Voting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees all that is dispatched, also by autograd and by DDP's reducer in C++, and votes before collectives."""

    def __init__(self, vote: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vote = vote

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this `torch.compile` would be off inside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it dispatches its own collectives, which then come here
        if "c10d" in func.namespace and func._opname not in _NO_COLLECTIVES and not _traced(args):
            self.vote(1 + zlib.crc32(func._opname.encode()))
        return func(*args, **(kwargs or {}))


def _traced(args: Any) -> bool:
    """Whether a compiler only traces the call."""
    from torch._subclasses.fake_tensor import FakeTensor

    leaves = torch.utils._pytree.tree_leaves(args)
    return any(isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.Tensor) and leaf.is_meta) for leaf in leaves)


def communicates(model: nn.Module) -> bool:
    """Whether a step of `model` holds collectives: DDP, FSDP of either kind, or parameters that are DTensors."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    kinds = (FSDPModule, FullyShardedDataParallel, nn.parallel.DistributedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
