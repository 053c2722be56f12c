"""The largest batch from memory, model size, sequence length and sparsity (arXiv 2408.04693, equation 1).

  bytes(B, L, S) = M_model + B·L·((1 - C1) + C1·S)·κ        κ = 1/C0, bytes of a token where all experts are at work
  B_max = ⌊C0·(M_gpu - M_model)/(L·((1 - C1) + C1·S))⌋

S is the share of experts at work, L the padded length of a query, M_model the loaded weights with adapters and
optimizer: sparse tuning loads all experts, so it does not shrink with S. C1 is the share of the activations that does.

All memory is in bytes. The paper's C0 counts queries·tokens per GB, and its GB is not stated. B_max is the same for 1e9
and 2^30 bytes as long as the card and M_model are in that GB too: a card of "48 GB" is then 48e9 bytes. The cards of
`hardware()` are of 2^30, as they report: with those the published constants need `gb=2**30`, and M_model in it, or
B_max comes out 10 to 25 % too large (10 for 8 on an A40, 22 for 20 on an H100-80).

Its text fits C0 = 82, C1 = 0.95 to Mixtral and 83, 0.88 to BlackMamba; its code draws Mixtral with 62, 0.89, M_model =
23.35 and L = 512, and its plotted 27 queries at 80 GB are not met (20).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.checks import check_not_negative, check_positive, check_share, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch, check_sparsity, measured

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True)
class BatchMemoryModel(JsonNoun):
    """bytes_per_token: κ. sparse_share: C1. model_bytes: M_model. residuals: measured/predicted - 1 of each point.

    largest_batch: of the points; None where the constants were given. sequence_lengths: of the points, none if so.
    gb: bytes of the GB by which C0 counts, 1e9 or 2**30.

    >>> mixtral = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35e9)
    >>> [mixtral.max_batch(gpu * 1e9, 512, 0.25) for gpu in (40, 48, 80)]
    [6, 8, 20]
    """

    bytes_per_token: Estimate
    sparse_share: Estimate
    model_bytes: Estimate
    residuals: tuple[float, ...] = ()
    largest_batch: float | None = None
    sequence_lengths: tuple[float, ...] = ()
    gb: float = GB

    @classmethod
    def of(cls, *, c0_per_gb: float, sparse_share: float, model_bytes: float, gb: float = GB) -> BatchMemoryModel:
        """From constants. c0_per_gb: C0, queries·tokens per `gb` bytes, which are 1e9 or 2**30.

        >>> gib = 2**30
        >>> mixtral = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35 * gib, gb=gib)
        >>> [mixtral.max_batch(gpu * gib, 512, 0.25) for gpu in (40, 48, 80)]
        [6, 8, 20]
        """
        if not holds(lambda value: value in (GB, GIB), gb):
            raise InputError(f"gb must be 1e9 or 2**30 bytes, got {gb!r}")
        check_positive(c0_per_gb=c0_per_gb)
        check_share(sparse_share=sparse_share)
        check_not_negative(model_bytes=model_bytes)
        return cls(given(gb / c0_per_gb), given(sparse_share), given(model_bytes), gb=float(gb))

    @classmethod
    def fit(
        cls,
        points: Sequence[MeasuredBatch | Sequence[float]],
        *,
        model_bytes: float | None = None,
        sparse_share: float | None = None,
        coverage: float = 0.95,
    ) -> BatchMemoryModel:
        """From peaks of memory at several batches: least squares on the bytes, which are linear in M_model, κ(1 - C1)
        and κC1. Intervals are Student's, of C1 Fieller's, for errors of one size in bytes.

        model_bytes, sparse_share: M_model and C1 where they are known; C1 = 0 where no point has a sparsity.
        Raises `InputError` where the points cannot tell the unknowns apart: M_model needs two sizes of B·L, C1 two
        sparsities.
        """
        from batchlab.planner.fine_tune.memory_fit import fit_bytes

        return fit_bytes(measured(points), model_bytes, sparse_share, coverage)

    @classmethod
    def fit_limits(
        cls,
        points: Sequence[MeasuredBatch | Sequence[float]],
        *,
        model_bytes: float | None = None,
        sparse_share: float | None = None,
        coverage: float = 0.95,
    ) -> BatchMemoryModel:
        """From the largest batches that fit: each point's `peak_bytes` is the memory of a card, its `batch` what fits.

        Least squares on ln B: errors count by ratio. Whole batches are up to one too small, so B_max of 10 and less
        bias it: prefer `fit`. Intervals are from the linearised law and hold for errors of some percent.
        M_model needs two cards (or to be given), C1 two sparsities.
        """
        from batchlab.planner.fine_tune.memory_fit import fit_limits

        return fit_limits(measured(points), model_bytes, sparse_share, coverage)

    @property
    def c0_per_gb(self) -> float:
        """C0: queries·tokens per GB of `gb` bytes."""
        return self.gb / self.bytes_per_token.value

    def length(self, sequence_length: float | None = None) -> float:
        """L as given; None takes the points' own, if they have one alone. Else it must be given."""
        if sequence_length is None:
            if len(self.sequence_lengths) != 1:
                known = (
                    f"the points have {list(self.sequence_lengths)}" if self.sequence_lengths else "no points say it"
                )
                raise InputError(f"sequence_length must be given, the tokens of a padded query: {known}")
            return self.sequence_lengths[0]
        check_positive(sequence_length=sequence_length)
        return sequence_length

    def query_bytes(self, sequence_length: float | None = None, sparsity: float = 1.0) -> float:
        """What one query adds: L·((1 - C1) + C1·S)·κ. sequence_length: see `length`, here and below."""
        length = self.length(sequence_length)
        check_sparsity(sparsity)
        share = 1 - self.sparse_share.value * (1 - sparsity)
        each = length * share * self.bytes_per_token.value
        if not each > 0:
            raise InputError(
                f"sparsity {sparsity!r} is beyond what the model holds for: a query would take {each:.3g} B"
            )
        return each

    def bytes(self, batch: float, sequence_length: float | None = None, sparsity: float = 1.0) -> float:
        """The peak at a batch."""
        check_not_negative(batch=batch)
        return self.model_bytes.value + batch * self.query_bytes(sequence_length, sparsity)

    def max_batch(
        self, gpu_bytes: float, sequence_length: float | None = None, sparsity: float = 1.0, *, reserve: float = 0.0
    ) -> int:
        """B_max, 0 where not one query fits. reserve: the share of memory to leave free for fragmentation."""
        room = self._room(gpu_bytes, reserve)
        each = self.query_bytes(sequence_length, sparsity)
        batch = int(max(0, math.floor((room - self.model_bytes.value) / each)))
        if batch and self.bytes(batch, sequence_length, sparsity) > room:  # the quotient was rounded up,
            return batch - 1
        return batch + int(self.bytes(batch + 1, sequence_length, sparsity) <= room)  # or down

    def missing_bytes(
        self,
        gpu_bytes: float,
        sequence_length: float | None = None,
        sparsity: float = 1.0,
        *,
        batch: float = 1,
        reserve: float = 0.0,
    ) -> float:
        """What the memory lacks for `batch` queries; 0 where they fit."""
        return max(0.0, self.bytes(batch, sequence_length, sparsity) - self._room(gpu_bytes, reserve))

    @staticmethod
    def _room(gpu_bytes: float, reserve: float) -> float:
        check_positive(gpu_bytes=gpu_bytes)
        if not holds(lambda share: 0 <= share < 1, reserve):
            raise InputError(f"reserve must lie in [0, 1), got {reserve!r}")
        return gpu_bytes * (1 - reserve)


def given(value: float) -> Estimate:
    """A number without spread."""
    return Estimate(float(value), float(value), float(value), "given")
