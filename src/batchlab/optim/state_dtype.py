"""In how many bits an optimizer keeps its state: float32, bfloat16, or 8 bits in torchao's tensors.

None: float32 for parameters in half precision, else the parameter's own dtype. torch.bfloat16: half the memory; an
average of squares, with a share of new values below 2^-8, would stand still in it and stays in float32. "8bit":
torchao's blockwise 8-bit (Dettmers et al. 2021, arXiv 2110.02861), for tensors of 4,096 elements and more that its
blocks of 256 divide; smaller ones stay in float32, as torchao has it. A dtype may also be given by its name, as a plan
in JSON has it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.parallel.shards import is_spread, share

StateDtype = torch.dtype | Literal["float32", "bfloat16", "8bit"] | None
_NAMED: dict[Any, StateDtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK, FEWEST = 256, 4096


def checked_state_dtype(state_dtype: StateDtype, optimizer: str, *, allowed: bool) -> StateDtype:
    """A name as its dtype. Refuses what is not known, what the rule does not allow, and 8 bits without torchao."""
    if isinstance(state_dtype, str):
        state_dtype = _NAMED.get(state_dtype, state_dtype)
    if state_dtype is None:
        return None
    if state_dtype not in (torch.float32, torch.bfloat16, "8bit"):
        raise InputError(f'state_dtype must be None, torch.float32, torch.bfloat16 or "8bit", got {state_dtype!r}')
    if state_dtype is not torch.float32 and not allowed:
        raise InputError(f"{optimizer} keeps its state in float32, got state_dtype={state_dtype!r}: its rule needs it")
    if state_dtype == "8bit":
        _torchao()
    return state_dtype


def state_like(parameter: Tensor, state_dtype: StateDtype, *, squares: bool) -> Tensor:
    """Zeros like the parameter, spread as it is. squares: whether what is kept is never negative."""
    state_dtype = _NAMED.get(state_dtype, state_dtype)
    if state_dtype == "8bit":
        part = share(parameter).part
        if parameter.numel() >= FEWEST and part.numel() % BLOCK == 0 and part.numel() > 0:
            return _eight_bits(parameter, part, squares)
        state_dtype = torch.float32
    if state_dtype is None or (squares and state_dtype == torch.bfloat16):
        state_dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=cast(torch.dtype, state_dtype), requires_grad=False)


def in_dtype(part: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the arithmetic: the tensor itself where it is in it already."""
    if part.dtype == dtype and type(part) is Tensor:
        return part
    return part.dequantize().to(dtype) if hasattr(part, "codes") else part.to(dtype)


def dense(state: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's part of a state that may be spread, in the dtype of the arithmetic."""
    return in_dtype(share(state).part, dtype)


def put_back(state: Tensor, fine: Tensor) -> None:
    """Rounds what `dense` gave to the dtype that is kept; does nothing where it was changed in place."""
    part = share(state).part
    if hasattr(part, "codes") or part.dtype != fine.dtype:
        part.copy_(fine)


def _eight_bits(parameter: Tensor, part: Tensor, squares: bool) -> Tensor:
    held = cast(Tensor, _torchao().zeros(part.shape, not squares, BLOCK, part.device))
    if not is_spread(parameter):
        return held
    from torch.distributed.tensor import DTensor

    spread = cast(Any, parameter)
    return DTensor.from_local(
        held,
        device_mesh=spread.device_mesh,
        placements=spread.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@cache
def _torchao() -> Any:
    """Its 8-bit tensor, which can be copied: torchao 0.18's cannot, so that no optimizer with one could either."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError:
        raise InputError('state_dtype="8bit" needs torchao: pip install "batchlab[lowbit]"') from None
    try:
        OptimState8bit.zeros((BLOCK,), device=torch.device("cpu")).clone()
    except NotImplementedError:
        OptimState8bit.implements(torch.ops.aten.clone.default)(_clone)
    return OptimState8bit


def _clone(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    parts, attributes = args[0].__tensor_flatten__()
    held = {name: getattr(args[0], name).clone() for name in parts}
    return cast(Tensor, type(args[0]).__tensor_unflatten__(held, attributes))
