"""Stationary blending of sources, with an account of each (Żelasko et al. 2024, EMMeTT, arXiv 2409.13523).

Sources are drawn at constant shares w_k through the whole run, with no epoch of the whole: each source goes through its
own epochs, without replacement, and wraps when it is out. SlimPajama-DC (arXiv 2309.10818) states w by tokens and draws
sequences: then a source is drawn in proportion to w_k over its mean tokens a sequence.

EMMeTT draws each source independently. Here the order is that of `SourceOrder`: the same share at each position, counts
that stray less, and a formula for how many of each came before, so that any position is reached at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import as_count, check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.data.mixtures.source_order import SourceOrder
from batchlab.data.stream import SampleStream
from batchlab.data.stream_batches import StreamBatches


@dataclass(frozen=True)
class Drawn(JsonNoun):
    """What was drawn of one source. examples: how many; share: of all examples drawn; wanted: the share asked for.

    tokens, share_of_tokens: by the source's mean length, None where it is not known. epochs: examples drawn over those
    there are. wraps: how often it began anew.
    """

    name: str
    examples: int
    share: float
    wanted: float
    tokens: float | None
    share_of_tokens: float | None
    epochs: float
    wraps: int


def temperature_weights(sizes: Mapping[str, float], temperature: float) -> dict[str, float]:
    """w_k = n_k^(1/T)/Σ n^(1/T): in proportion to size at T = 1, nearer to uniform the larger T.

    >>> temperature_weights({"large": 90, "small": 10}, 2.0)
    {'large': 0.75, 'small': 0.25}
    """
    check_positive(temperature=temperature)
    check_positive(**{f"sizes[{name!r}]": size for name, size in sizes.items()})
    most = max(sizes.values())
    raised = {name: (size / most) ** (1 / temperature) for name, size in sizes.items()}
    total = sum(raised.values())
    return {name: each / total for name, each in raised.items()}


class Blend(StreamBatches):
    """Endless batches from several sources at constant shares; a `StreamBatches` over them, `batch_size` included.

    sizes: the examples of each source. Indices are those of a `ConcatDataset` of the sources in this order.
    weights: of each source, w_k > 0, normalised here. temperature: instead of weights, w_k in proportion to
    size^(1/temperature); with neither, in proportion to size. by: what weights are shares of, "examples" or "tokens";
    tokens: the total tokens of each source, needed for "tokens", and for a report by tokens.
    batch_size: over all ranks, in examples; may be set anew at any time. seed: of the order of sources and of each
    source's shuffles: the same on all ranks.

    The source and example at a position depend on (seed, position), sizes and weights alone. Weights are settled for a
    run; a state of other weights is refused. Sizes of sources are not limits: see `report` for what wrapped.

    Not where each example is to be seen once: a plain shuffle of all sources mixes them by size and has an end.

    >>> blend = Blend({"web": 6, "books": 2}, batch_size=4, weights={"web": 1, "books": 1})
    >>> batches = iter(blend)
    >>> seen = sum((next(batches) for _ in range(256)), [])
    >>> [(each.name, each.examples, each.epochs, each.wraps) for each in blend.report()]
    [('web', 512, 85.33333333333333, 85), ('books', 512, 256.0, 255)]
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        seed: int = 0,
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        by: Literal["examples", "tokens"] = "examples",
        tokens: Mapping[str, float] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not isinstance(sizes, Mapping) or not sizes:
            right = 'the examples of each source, as {"web": 1000, "books": 200}'
            raise InputError(f"sizes must give {right}, got {sizes!r}")
        check_count(**{f"sizes[{name!r}]": size for name, size in sizes.items()})
        sizes = {name: int(size) for name, size in sizes.items()}
        super().__init__(sum(sizes.values()), batch_size, seed, endless=True, rank=rank, world_size=world_size)
        self.sizes = sizes
        self.by = by
        self.tokens = _tokens(tokens, self.sizes, by)
        self.weights = _weights(weights, temperature, self.sizes if by == "examples" else self.tokens)
        drawn = self.weights
        if self.tokens and by == "tokens":
            drawn = {name: weight * sizes[name] / self.tokens[name] for name, weight in drawn.items()}
        self._order = SourceOrder(list(drawn.values()), derive_seed(self.seed, "blend"))
        self._stream = _Sources(list(self.sizes.values()), self._order, self.seed)

    def identity(self) -> dict[str, Any]:
        """Sources in their order, sizes and weights."""
        tokens = self.tokens if self.by == "tokens" else None
        found = {"sources": list(self.sizes), "sizes": self.sizes, "weights": self.weights}
        return found | {"by": self.by, "tokens": tokens}

    def report(self, batches: int | None = None) -> tuple[Drawn, ...]:
        """What was drawn of each source, over all ranks, in the run's first batches; by default in those handed out."""
        batches = batches if batches is None else as_count(0, batches=batches)
        counts = self._order.before(self.position(batches)).tolist()
        drawn = dict(zip(self.sizes, counts, strict=True))
        spent = (
            {name: drawn[name] * self.tokens[name] / size for name, size in self.sizes.items()} if self.tokens else {}
        )
        examples, tokens = max(sum(counts), 1), max(sum(spent.values()), 1)
        return tuple(
            Drawn(
                name=name,
                examples=drawn[name],
                share=drawn[name] / examples,
                wanted=self.weights[name],
                tokens=spent.get(name),
                share_of_tokens=spent[name] / tokens if spent else None,
                epochs=drawn[name] / size,
                wraps=max(drawn[name] - 1, 0) // size,
            )
            for name, size in self.sizes.items()
        )

    def sources(self, start: int, count: int) -> list[str]:
        """The names of the sources at `count` positions of the stream from `start` on."""
        names, start, count = list(self.sizes), as_count(0, start=start), as_count(0, count=count)
        return [names[which] for which in self._order.span(start, count)[0].tolist()]


class _Sources(SampleStream):
    """The stream of a blend: the j-th draw of source k is the j-th of k's own sample stream."""

    def __init__(self, sizes: list[int], order: SourceOrder, seed: int) -> None:
        super().__init__(sum(sizes), seed)
        self._order = order
        self._starts = np.cumsum([0, *sizes])
        self._each = [SampleStream(size, derive_seed(seed, "blend source", at)) for at, size in enumerate(sizes)]

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """The indices at positions start .. start + count - 1."""
        which, number = self._order.span(start, count)
        found = np.empty(count, dtype=np.int64)
        for source in np.unique(which).tolist():
            here = which == source  # of one source the numbers follow each other
            first, size = int(number[here][0]), int(here.sum())
            found[here] = self._starts[source] + self._each[source].indices(first, size)
        return found


def _tokens(tokens: Mapping[str, float] | None, sizes: Mapping[str, int], by: str) -> dict[str, float]:
    if by not in ("examples", "tokens"):
        raise InputError(f'by must be "examples" or "tokens", got {by!r}')
    if tokens is None:
        if by == "tokens":
            raise InputError('tokens must give the total tokens of each source where by is "tokens", got None')
        return {}
    _same_names("tokens", tokens, sizes)
    check_positive(**{f"tokens[{name!r}]": total for name, total in tokens.items()})
    return {name: float(tokens[name]) for name in sizes}


def _weights(
    weights: Mapping[str, float] | None, temperature: float | None, sizes: Mapping[str, float]
) -> dict[str, float]:
    if weights is None:
        return temperature_weights(sizes, 1.0 if temperature is None else temperature)
    if temperature is not None:
        raise InputError("temperature must be None where weights are given")
    _same_names("weights", weights, sizes)
    check_positive(**{f"weights[{name!r}]": weight for name, weight in weights.items()})
    given = {name: float(weights[name]) for name in sizes}
    total = sum(given.values())
    return {name: weight / total for name, weight in given.items()}


def _same_names(what: str, given: Mapping[str, float], sizes: Mapping[str, float]) -> None:
    if not isinstance(given, Mapping) or given.keys() != sizes.keys():
        raise InputError(f"{what} must name the sources {list(sizes)}, got {list(given)}")
