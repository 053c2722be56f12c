"""Whether dim 0 of each layer's output is the example: a gradient in one row must stay in its row on the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchlab.measure.examples.layer_uses import RecordedUse


class RowProbe:
    """Sends the gradients of two rows back through a graph whose uses call `see` with what arrives.

    names: of the parameters by place. examples: the rows.
    """

    def __init__(self, names: Sequence[str], examples: int) -> None:
        self._names, self._examples, self._row = names, examples, -1

    @property
    def active(self) -> bool:
        """Whether it is sending now."""
        return self._row >= 0

    def doubt(self, uses: Sequence[RecordedUse], *, swapped: bool) -> str:
        """What the shapes leave open and no gradient could tell: layers that agree with each other may all be wrong."""
        n = self._examples
        if swapped and any(u.shape[:2] == (n, n) and len(u.shape) > 2 and not u.layout.dim for u in uses):
            return "examples and positions are equally many and change places: use another size"
        if uses and not any(n in use.shape[: use.layout.dim + 1] for use in uses):
            return f"no layer's output has the {n} examples as a dimension of its own"
        return ""

    def mixed(self, uses: Sequence[RecordedUse]) -> str:
        """Where rows mix, or nothing.

        From the last use back, then from the last of those that this did not reach, and so on.
        """
        left = list(uses)
        while len(left) > 1:
            root = left.pop()
            inputs = [u for i, u in enumerate(left) if i == 0 or u.source]
            for row in (0, self._examples - 1):
                self._row = row
                self._send_back(root, inputs)
            self._row = -1
            for use in uses:
                if use.mixed:
                    names = ", ".join(self._names[part.place] for part in use.parts)
                    return f"the gradient of one example reaches others at the {use.name} of {names}"
            left = [use for use in left if not use.verified]
        return ""

    def _send_back(self, root: RecordedUse, inputs: Sequence[RecordedUse]) -> None:
        generator = torch.Generator("cpu").manual_seed(self._row)
        cotangent = torch.zeros(root.shape, dtype=root.dtype, device=root.device)
        first = root.layout.first(cotangent)
        group = len(first) // self._examples
        row = first[self._row * group : (self._row + 1) * group]
        row.copy_(torch.randn(row.shape, generator=generator, device="cpu"))
        edges = [use.edge for use in (root, *inputs) if use.edge is not None]
        torch.autograd.grad(edges[:1], edges[1:], grad_outputs=[cotangent], retain_graph=True, allow_unused=True)

    def see(self, use: RecordedUse, g: Tensor) -> None:
        """What came back to a use while it was sending."""
        use.verified = True
        rows = use.layout.fold(g, 0).reshape(self._examples, -1)
        others = torch.cat([rows[: self._row], rows[self._row + 1 :]])
        use.mixed |= bool(((others != 0) & ~others.isnan()).any())
