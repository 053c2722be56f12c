"""|g|² of many gradients on a GPU with few calls: there a call's own time counts, not its sums."""

from __future__ import annotations

import torch
from torch import Tensor

from batchlab.measure.norms import wide

HELD = 2**25  # bytes of gradients that may wait for each other


class DeviceNorms:
    """Takes gradients one by one, as hooks see them, and gives their squared norms when all are there.

    Norms are taken of lists of up to 32 MiB of gradients, which are held until then. They are summed in float32, or in
    float64 for gradients in it, by a tree: as exact as sums in chunks.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._held: list[tuple[int, Tensor]] = []
        self._bytes = 0
        self._norms: list[tuple[int, Tensor]] = []

    def see(self, place: int, gradient: Tensor, *, keeps: bool) -> None:
        """A dense gradient. keeps: whether it may be held; one that will become `.grad` itself would be copied then."""
        if not keeps or gradient.nbytes > HELD:
            self._norms.append((place, torch.linalg.vector_norm(gradient.detach(), dtype=wide(gradient))))
            return
        self._held.append((place, gradient))  # itself: beside a detached one `.grad` of another leaf could become it
        self._bytes += gradient.nbytes
        if self._bytes > HELD:
            self._measure()

    def squares(self) -> dict[int, Tensor]:
        """|g|² of each, by its place, as numbers on its device; forgotten then."""
        self._measure()
        together: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        for place, norm in self._norms:
            together.setdefault((norm.device, norm.dtype), []).append((place, norm))
        found: dict[int, Tensor] = {}
        for each in together.values():
            squares = torch.stack([norm for _, norm in each]).square()
            found.update(zip([place for place, _ in each], squares.unbind(), strict=True))
        self.clear()
        return found

    def _measure(self) -> None:
        held, self._held, self._bytes = self._held, [], 0  # at once: each device has a thread of its own
        together: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        for place, gradient in held:
            together.setdefault((gradient.device, gradient.dtype), []).append((place, gradient.detach()))
        for each in together.values():
            norms = torch._foreach_norm([gradient for _, gradient in each], dtype=wide(each[0][1]))
            self._norms += zip([place for place, _ in each], norms, strict=True)
