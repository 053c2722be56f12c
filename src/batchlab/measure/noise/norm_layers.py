"""tr(Σ) of a whole model from that of its normalisation layers, whose per-example gradients are nearly free.

Gray, Tiwari, Bergsma and Hestness 2024 (arXiv 2411.00999) found that the noise scale of the normalisation layers
follows that of all layers. Here only the trace is taken from them, times a factor α = tr(Σ)/tr(Σ_norm) that is measured
in the run itself on a step now and then: |G|² needs no example's own gradient, so it is always that of all layers.

Of a layer that has both, β alone is looked at: its gradient is a sum, that of γ a product with the normalised input,
which costs ten times as much and tells no more (spread of the estimate at fixed weights with both and with β: 0.21 and
0.22 on the digits' CNN, 0.082 and 0.090 on a byte transformer).

α moves: it fell to a third within 200 steps of the digits' CNN and by a fifth on the byte transformer, most of it
early, while the traces themselves fell a thousandfold. So it is measured often at first, and averaged as a ratio: an
average over the traces is one over the oldest, and came out four times too large on the transformer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.examples.example_norms import norm_layer_names
from batchlab.measure.noise.example_pieces import ExamplePieces
from batchlab.measure.noise.noise_pair import NoisePair
from batchlab.measure.noise.norm_pieces import NormPieces
from batchlab.measure.ratio import RatioOfMeans

GROWTH, AGAIN, KEEP, AGREE = 8, 50, 0.7, 0.01
FIRST, SETTLED = 2 * GROWTH, GROWTH**2  # measured steps until all layers are no longer measured at each, in 1 of 8


class NormLayers:
    """When to measure all layers, and what the normalisation layers' share says of all.

    parameters: of the normalisation layers. All layers are measured at the first 16 measured steps, then each time
    that an eighth more have passed, from 400 on at one in 50; α remembers about 6 of these. The numbers are batchlab's:
    a step with all layers costs a third more, and the estimate then kept within 5 % of `per_example`'s along 300 steps
    of the transformer.
    """

    def __init__(self, model: nn.Module, *, coverage: float) -> None:
        names = norm_layer_names(model)
        if not names:
            raise InputError('method "norm_layers" needs a layer, RMS, group or instance norm with trainable weights')
        own = dict(model.named_parameters(remove_duplicate=False))
        told = [name for name in names if name.removesuffix("weight") + "bias" not in names]
        self.parameters: list[nn.Parameter] = list(dict.fromkeys(own[name] for name in told))
        self.turn, self._due = 0, 0
        self._fast, self._model = NormPieces(model, self.parameters), model
        self._slow: ExamplePieces | None = None
        self._differed = 0
        self._behind: float | None = None
        self._alpha = RatioOfMeans(ema=KEEP, coverage=coverage)

    @property
    def calibrates(self) -> bool:
        """Whether this step is one to measure all layers at."""
        return self.turn >= self._due

    @property
    def source(self) -> NormPieces | ExamplePieces:
        """What the layers' own pieces are told by: their hooks, or where those are not sound the general rules."""
        if self._fast.sound:
            return self._fast
        if self._slow is None:
            self._slow = ExamplePieces(self._model, self.parameters)
        return self._slow

    @contextlib.contextmanager
    def beside(self, all_layers: contextlib.AbstractContextManager[None], examples: int) -> Iterator[None]:
        """Watches the layers by their hooks too while all layers are measured, to compare the two."""
        with contextlib.ExitStack() as stack:
            if self._fast.sound:
                stack.enter_context(self._fast.watch(examples, every_one=True))
            stack.enter_context(all_layers)
            yield

    def compare(self, square: float) -> None:
        """square: Σ|c_i|² of the layers as the measurement of all layers has it; the hooks must have the same.

        At its first pass that measurement sends rows of its own back through the graph, which the hooks see too: so
        among the first steps it takes three that differ in a row.
        """
        seen = self._fast.square
        self.forget()
        differs = math.isfinite(square) and not math.isclose(seen, square, rel_tol=AGREE)
        self._differed = self._differed + 1 if differs else 0
        if self._differed > (2 if self.turn < FIRST else 0):
            self._fast.sound = False

    def forget(self) -> None:
        """What the layers' own hooks saw beside the measurement of all layers."""
        self._fast.take()
        self._fast.witness.forget()

    def calibrate(self, trace: float, norm_trace: float) -> None:
        """Takes in tr(Σ) of all layers and of the normalisation layers at one step, which `turn` counts already."""
        if norm_trace > 0:
            self._alpha.update(trace / norm_trace, 1.0)
            mean, before = self._alpha.means[0], self._behind
            self._behind = mean if before is None else KEEP * before + (1 - KEEP) * mean
        self._due = self.turn - 1 + min(max(self.turn // GROWTH, 1), AGAIN)

    def pair(self, norm_trace: float, big_sq_norm: float, big: float) -> NoisePair | None:
        """The whole model's pair, |G|² = |g|² - α·tr(Σ_norm)/N; None while α is not known."""
        if not self._alpha.count:
            return None
        own = self._alpha.means[0] * norm_trace
        return NoisePair(big_sq_norm - own / big, own)

    def widened(self, estimate: Estimate, batch_size: float) -> Estimate:
        """The estimate's interval with α's own uncertainty in it; also the low end of one that is undefined.

        In log, 𝓑 moves by (1 + 𝓑/N) times what α moves by, N the batch size, and the errors add in quadrature: the
        scatter of the mean of α, and how far it is from its own running mean, which is how far it lags behind α.
        """
        alpha = self._alpha.ratio(lowest=0.0)
        at = estimate.value if estimate.defined else estimate.low  # where it is undefined its low end is all it says
        if not at > 0:
            return estimate
        behind = 0.0 if self._behind is None else self._behind
        reach, lag = 1 + at / batch_size, _log_ratio(max(alpha.value, behind), min(alpha.value, behind))
        up = math.hypot(_log_ratio(alpha.high, alpha.value), lag) * reach
        down = math.hypot(_log_ratio(alpha.value, alpha.low), lag) * reach
        high = at * _exp(math.hypot(_log_ratio(estimate.high, at), up))
        low = at / _exp(math.hypot(_log_ratio(at, estimate.low), down))
        said = f"{estimate.method}, tr(Σ) {alpha.value:.3g} [{alpha.low:.3g}, {alpha.high:.3g}] times that of its norms"
        return Estimate(estimate.value, low, high, said, estimate.coverage)

    def state_dict(self) -> dict[str, Any]:
        """The turn and α's sums, as plain numbers, and which examples are looked at next."""
        return {
            "turn": self.turn,
            "due": self._due,
            "alpha": self._alpha.state_dict(),
            "behind": self._behind,
            "sample": self._fast.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.turn, self._due, self._behind = state["turn"], state["due"], state["behind"]
        self._alpha.load_state_dict(state["alpha"])
        self._fast.load_state_dict(state["sample"])


def _log_ratio(more: float, less: float) -> float:
    return math.log(more / less) if 0 < less <= more < math.inf else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
