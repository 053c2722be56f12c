"""Which size to try next, knowing only which sizes fit and which do not (OOMptimizer, Żelasko et al. 2024)."""

from __future__ import annotations

import math

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError

GROWTH, LEAP = 4, 64


class SizeSearch:
    """The largest size that fits, found by growing, halving and bisecting. Every answer was tried and fitted.

    start: the first size. most: the largest allowed. rel_gap: it ends when (err - ok)/err <= rel_gap, with ok the
    largest size that fitted and err the smallest that did not; 0 finds the limit exactly.
    growth: the factor while everything fits; 4 takes fewer tries than 2 from starts far below the limit, and no more
    from near ones. leap: the least size to grow to, so that a start far below costs no more tries than a near one; 1
    for none. Over limits 1 to 300 the median of tries is 8 at most from any start: 8, 8, 8, 7 from 1, 7, 32, 256.
    expected: a size that should fit, tried first where larger ones have not fitted. least: none below it is tried.

    While nothing fits the size is halved; between ok and err the next one is their geometric mean, which halves the
    relative gap, and always lies strictly between, so that each try makes progress. A guess is taken in its place where
    it lies between, but not twice in a row unless the first one halved the gap too. A size is never tried twice; one
    that was only foreseen not to fit is tried before the answer rests on it.

    >>> search = SizeSearch(start=32, most=300)
    >>> while (size := search.next_size()) is not None:
    ...     search.record(size, fits=size <= 100)
    >>> search.ok, search.err, search.tried
    (98, 102, [32, 128, 64, 90, 107, 98, 102])
    """

    def __init__(
        self,
        *,
        start: int,
        most: int,
        rel_gap: float = 0.05,
        growth: int = GROWTH,
        leap: int = LEAP,
        expected: int | None = None,
        least: int = 1,
    ) -> None:
        check_count(start=start, max_size=most, least=least)
        if not 0 <= rel_gap < 1:
            raise InputError(f"rel_gap must lie in [0, 1), got {rel_gap!r}")
        self.start, self.most, self.rel_gap = min(start, most), most, rel_gap
        self.growth, self.leap, self.expected = growth, leap, expected
        self.raise_least(least)
        self.ok: int | None = None
        self._failed: int | None = None
        self.tried: list[int] = []
        self._foreseen: int | None = None
        self._wide = math.inf

    def raise_least(self, least: int) -> None:
        """Leaves out the sizes below it, before the first one is tried."""
        if self.most < least:
            raise InputError(f"max_size must be at least {least}, the fewest that can be run, got {self.most}")
        self.least, self.start = least, max(self.start, least)

    @property
    def err(self) -> int | None:
        """The smallest size that did not fit, or is foreseen not to."""
        return min((size for size in (self._failed, self._foreseen) if size is not None), default=None)

    def foresee(self, size: int) -> None:
        """Takes in that `size` is not expected to fit."""
        self._foreseen = min(size, self._foreseen or size)

    def record(self, size: int, *, fits: bool) -> None:
        """Takes in whether `size` fitted."""
        self.tried.append(size)
        if fits:
            self.ok = max(size, self.ok or size)
        else:
            self._failed = min(size, self._failed or size)
        if self._foreseen is not None and (self.ok or 0) >= self._foreseen:
            self._foreseen = None

    def next_size(self, guess: float | None = None) -> int | None:
        """What to try next; None when the answer is known. guess: where the limit is expected, taken if it helps."""
        size = self._next(guess)
        return self.err if size is None and self.err == self._foreseen != self._failed else size

    def _next(self, guess: float | None) -> int | None:
        ok, err = self.ok, self.err
        if ok is None:
            return self.start if err is None else self._smaller(err)
        if ok == self.most:
            return None
        if err is None:
            wanted = max(self.growth * ok, self.leap) if guess is None else math.floor(guess)
            return min(max(wanted, ok + 1), self.most)
        if err - ok <= 1 or (err - ok) / err <= self.rel_gap:
            return None
        wide, before = math.log(err / ok), self._wide
        helps = guess is not None and ok < math.floor(guess) < err and wide <= before / 2
        self._wide = wide if helps else math.inf
        between = math.floor(guess) if helps and guess is not None else math.isqrt(ok * err)
        return min(max(between, ok + 1), err - 1)

    def _smaller(self, err: int) -> int | None:
        """What to try below `err` where nothing has fitted yet; None where nothing is left."""
        if self.expected is not None and self.expected < err:
            return self.expected
        return None if err <= self.least else max(self.least, err // 2)
