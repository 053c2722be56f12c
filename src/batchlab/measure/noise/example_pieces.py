"""Each example of a micro-batch as a piece of its own: what `GradientNoise(method="per_example")` is fed with."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms
from batchlab.measure.noise.pieces import Piece
from batchlab.measure.noise.witness import Witness
from batchlab.measure.norms import total
from batchlab.parallel.shards import Mesh


class ExamplePieces:
    """The sums of |c_i|² over the examples i of each pass, c_i what example i adds to `.grad`, by parameter.

    parameters: of the model, those whose part is wanted. projections: as of `ExampleNorms`. It acts inside `watch`
    alone, which must hold the forward pass too; the same surface as `PieceNorms`.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], *, projections: int = 0) -> None:
        self.parameters = list(parameters)
        wanted = set(self.parameters)
        names = [name for name, p in model.named_parameters() if p in wanted]
        self._norms = ExampleNorms(model, parameters=names, projections=projections)
        places = {parameter: place for place, parameter in enumerate(self.parameters)}
        self._places = {name: places[p] for name, p in model.named_parameters() if p in wanted}
        self._pieces: list[Piece] = []
        self.witness = Witness(self.parameters)
        self.meshes: dict[int, Mesh] = {}
        self._busy = False

    @property
    def empty(self) -> bool:
        """Whether no pass has begun since the last `take`."""
        return not self._pieces and not self._busy

    @contextlib.contextmanager
    def watch(self, examples: int) -> Iterator[None]:
        """Around the forward and the backward pass of one micro-batch; a pass that raises is forgotten."""
        if self._busy:
            raise InputError("micro_batch must not be entered twice at once")
        self._busy = True
        hook = self.witness.listener(self._testify)
        try:
            with self._norms.watch(examples, scale=1.0) as record:
                yield
        finally:
            self._busy = False
            hook.remove()
        squares = {self._places[name]: part.double().sum() for name, part in record.by_parameter.items()}
        self._pieces.append(Piece(examples, dict(squares), number=examples))

    def _testify(self, gradient: object) -> None:
        if self.witness.wanted:
            self.witness.see(gradient)  # type: ignore[arg-type]

    def square(self, places: Collection[int]) -> float:
        """Σ|c_i|² over all examples since the last `take`, of some parameters."""
        return total([square for piece in self._pieces for place, square in piece.squares.items() if place in places])

    def choose_witness(self) -> bool:
        """Another witness, where the one there is got no gradient."""
        return self.witness.choose_anew()

    def take(self) -> list[Piece]:
        """The passes since the last `take`, which are then forgotten."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def state_dict(self) -> dict[str, int]:
        """The number of passes, on which the projections depend."""
        return {"passes": self._norms.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over what `state_dict` gave."""
        self._norms.passes = state["passes"]

    def unmet(self, pieces: Sequence[Piece]) -> list[int]:
        """None: parameters spread over ranks are refused, and what is not covered is by `watch`."""
        return []

    def listen(self) -> None:
        """Nothing to put on: hooks live inside `watch`."""

    def close(self) -> None:
        """Nothing to take off."""
