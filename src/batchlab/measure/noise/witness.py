"""Whether the gradients that hooks saw are those in `.grad`, and by which common factor they differ."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchlab.core.errors import InputError
from batchlab.measure.norms import sq_norm, to_floats
from batchlab.parallel.shards import whole

WITNESS = 1024
_EXACT, _STRANGE = 1e-4, 0.05


def _preference(parameter: Tensor) -> tuple[int, int]:
    """Least first: 2 to 1,024 numbers, the more the better; more, the fewer the better; one."""
    size = parameter.numel()
    if size < 2:
        return 2, 0
    return (0, -size) if size <= WITNESS else (1, size)


class Witness:
    """One small parameter whose gradients are added up, to tell whether those seen are those in `.grad`.

    The largest with at most 1,024 numbers, else the smallest; a single number, which is a multiple of any other, only
    where there is nothing else. wanted: whether it listens.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._left = sorted(parameters, key=_preference)
        self.parameter = self._left.pop(0)
        self.wanted = True
        self.nothing = torch.zeros(0, device=self.parameter.device, dtype=torch.float64)
        self._scaled: tuple[float, float] | None = None
        self.forget()

    def choose_anew(self) -> bool:
        """Takes the next parameter that has a gradient now, where the chosen one got none; False if there is none.

        Where parameters are spread over ranks, all ranks must call.
        """
        while self._left:
            candidate = self._left.pop(0)
            gradient = candidate.grad if candidate.requires_grad else None
            if gradient is not None and bool(whole(gradient.detach()).to_dense().any()):
                self.parameter = candidate
                self.nothing = torch.zeros(0, device=candidate.device, dtype=torch.float64)
                self.forget()
                return True
        return False

    def listener(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """A hook on the witness that calls `see`; one that does nothing where it was frozen."""
        if not self.parameter.requires_grad:
            return RemovableHandle(OrderedDict())
        handle: RemovableHandle = self.parameter.register_hook(see)  # type: ignore[no-untyped-call]
        return handle

    def forget(self) -> None:
        """Begins anew."""
        self.sum: Tensor | None = None
        self.squares: list[Tensor] = []
        self._mixed: list[Tensor] = []

    def see(self, gradient: Tensor, before: Tensor | None = None) -> None:
        """Adds what one backward pass gives. before: what it is added to, which must be what was seen so far."""
        gradient = whole(gradient.detach()).to_dense()
        if before is not None and self.sum is not None:
            self._mixed.append(sq_norm(whole(before.detach()).to_dense() - self.sum) - _STRANGE**2 * sq_norm(self.sum))
        self.sum = gradient.clone() if self.sum is None else self.sum.add_(gradient)
        self.squares.append(sq_norm(gradient))

    def take(self) -> Tensor:
        """Σc and, last, Σ|c|², as one vector on the parameter's device; forgotten then.

        Raises `InputError` where a pass was added to something else than the sum of those before it.
        """
        total, squares = self.sum, self.squares
        mixed = any(each > 0 for each in to_floats(self._mixed))
        self.forget()
        if mixed:
            raise InputError(
                'method "ranks" needs each rank\'s own sum over its micro-batches, but .grad was changed between two '
                "of them: under DistributedDataParallel, no_sync() on all but the last"
            )
        if total is None:
            return torch.zeros(self.parameter.numel() + 1, device=self.parameter.device, dtype=torch.float64)
        return torch.cat([total.flatten(), torch.stack(squares).sum().reshape(1)]).double()

    def factor(self, seen: Tensor, pieces: int, expected: float) -> float:
        """f in Σc = f·grad, over all pieces of all ranks: `seen` is the sum of the ranks' `take`.

        expected: f where nothing was done to the gradient, 1, or the ranks that it was averaged over. A loss scale
        that was taken out, or a division after the backward passes, is another f. Where the gradient cancels so far
        that nothing can be told, `expected`. Raises `InputError` where Σc is no multiple of `.grad`.
        """
        gradient = self.parameter.grad
        if gradient is None:
            return expected
        c, g = seen[:-1], whole(gradient.detach()).to_dense().flatten().to(seen)
        cc, cg, gg, each = to_floats([torch.dot(c, c), torch.dot(c, g), torch.dot(g, g), seen[-1]])
        reach = (each * pieces) ** 0.5
        if max(cc - cg * cg / gg if gg else cc, 0.0) ** 0.5 > _STRANGE * reach:
            raise InputError(
                "the gradients seen in micro_batch do not add up to .grad: every backward pass since zero_grad must be "
                "in a micro_batch, and step must come before anything but a common factor changes .grad"
            )
        unsure = max(_EXACT, 8 * torch.finfo(gradient.dtype).eps) * reach / (cc**0.5 or 1.0)
        if gg == 0 or unsure > 0.5 or abs(cg / gg / expected - 1) <= unsure:
            return expected
        return cg / gg

    def refuse_clipped(self, grad_sq_norm: float, factor: float) -> None:
        """Raises `InputError` where two steps whose `.grad` was scaled differently have one and the same norm.

        A factor of two more is that of a loss scale which grew. factor: what `factor` gave over what it expected.
        """
        if factor == 1:
            return
        last, self._scaled = self._scaled, (grad_sq_norm, factor)
        if last is None or abs(grad_sq_norm - last[0]) > _EXACT * last[0]:
            return
        doublings = abs(math.log2(factor / last[1]))
        if abs(doublings - round(doublings)) > _EXACT:
            raise InputError(
                ".grad has the same norm at two steps and was scaled differently: it was clipped or normalised before "
                "step; call step first, or clipped steps count for too little"
            )
