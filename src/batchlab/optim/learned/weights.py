"""The weights of small_fc_lopt: a network of some 2,400 numbers and seven decays, read from a local file or a dict.

Two layouts are read. PyLO's: `network.input.weight` (hidden, 39), `network.linear_0.weight`, ...,
`network.output.weight` (2, hidden) and their biases. JAX's (google/learned_optimization): `w0` (39, hidden), `b0`,
`w1`, ... under any prefix. Both may hold `momentum_decays` (3), `rms_decays` (1) and `adafactor_decays` (3), the
learned shifts δ of the decays: β = clip(1 - exp(10·(ln(1 - β₀)/10 + δ)), 0, 1), that is 1 - (1 - β₀)·e^(10δ), clipped.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.files import existing, replace_atomic
from batchlab.optim.learned.features import INPUTS

SHIPPED = Path(__file__).parent / "trained" / "small_fc_lopt.safetensors"
DECAYS = {"momentum_decays": (0.9, 0.99, 0.999), "rms_decays": (0.999,), "adafactor_decays": (0.9, 0.99, 0.999)}
PYLO_DELTAS = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
STEP_MULT, EXP_MULT = 0.01, 0.001  # PyLO's


@dataclass(frozen=True)
class OptimizerWeights:
    """layers: weight (out, in) and bias of each layer in turn. deltas: (7,), the shifts δ of the decays of three
    momenta, of the average of squares and of its three factored forms. step_mult, exp_mult: the scales it was trained
    with. about: how it was trained, as its file says.
    """

    layers: tuple[Tensor, ...]
    deltas: Tensor
    step_mult: float = STEP_MULT
    exp_mult: float = EXP_MULT
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A text that tells networks apart."""
        numbers = [each.detach().to("cpu", torch.float64).contiguous().numpy() for each in (*self.layers, self.deltas)]
        return hashlib.sha256(b"".join(each.tobytes() for each in numbers)).hexdigest()[:16]

    def betas(self) -> Tensor:
        """The seven decays.

        >>> deltas = torch.tensor(sum(PYLO_DELTAS.values(), ()))
        >>> [round(beta, 6) for beta in OptimizerWeights((), deltas).betas().tolist()]
        [0.542027, 0.958441, 0.998024, 0.998886, 0.356218, 0.996626, 0.999461]
        """
        return betas(self.deltas)


def betas(deltas: Tensor) -> Tensor:
    """β of the shifts δ, (7,): clip(1 - (1 - β₀)·e^(10δ), 0, 1)."""
    start = deltas.new_tensor([1 - beta for each in DECAYS.values() for beta in each])
    return (1 - start * (10 * deltas).exp()).clamp(0, 1)


def fresh_weights(seed: int, hidden: int = 32, layers: int = 2) -> OptimizerWeights:
    """Random weights to train from: normal with a deviation of 1/√inputs, cut at two of them; biases and δ zero."""
    check_count(hidden=hidden, layers=layers)
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = [INPUTS, *[hidden] * layers, 2]
    found = []
    for inputs, outputs in pairwise(sizes):
        weight = torch.empty(outputs, inputs, device="cpu")
        std = inputs**-0.5
        torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        found += [weight, torch.zeros(outputs, device="cpu")]
    return OptimizerWeights(tuple(found), torch.zeros(7, device="cpu"))


def load_weights(source: str | Path | Mapping[str, Any] | OptimizerWeights | None) -> OptimizerWeights:
    """From a .safetensors or .npz file, from a dict of arrays (nested as JAX has it, or flat), or those that ship.

    A file's metadata may give `step_mult` and `exp_mult`. Shifts of decays that are missing are PyLO's own. Raises
    `InputError` that says which shapes are right.
    """
    if not isinstance(source, str | Path | Mapping | OptimizerWeights | None):
        raise InputError(f"weights must be a file, a dict of arrays or OptimizerWeights, got {source!r:.80}")
    if isinstance(source, OptimizerWeights):
        _check(source.layers, source.deltas)
        return source
    if source is None and not SHIPPED.exists():
        raise InputError(
            f"weights must be a local file or a dict, for none are at {SHIPPED}: make them with "
            "scripts/meta_train_optimizer.py, or save PyLO's with safetensors; nothing is downloaded"
        )
    about: Mapping[str, str] = {}
    if isinstance(source, Mapping):
        arrays = _flat(source)
    else:
        arrays, about = _read(SHIPPED if source is None else existing(source))
    found = {name: _tensor(name, each) for name, each in arrays.items()}
    layers, deltas = _layers(found), _deltas(found)
    _check(layers, deltas)
    scales = {key: _number(key, about[key]) for key in ("step_mult", "exp_mult") if key in about}
    return OptimizerWeights(layers, deltas, about=dict(about), **scales)


def save_weights(path: str | Path, weights: OptimizerWeights) -> None:
    """To a .safetensors file in PyLO's layout, with the decays' shifts, the scales and `about` in its metadata."""
    from safetensors.torch import save_file

    stages = ["input", *(f"linear_{index}" for index in range(len(weights.layers) // 2 - 2)), "output"]
    tensors: dict[str, Tensor] = {}
    for stage, weight, bias in zip(stages, weights.layers[::2], weights.layers[1::2], strict=True):
        tensors |= {f"network.{stage}.weight": weight.contiguous(), f"network.{stage}.bias": bias.contiguous()}
    for name, each in zip(DECAYS, torch.split(weights.deltas, [3, 1, 3]), strict=True):
        tensors[name] = each.clone()
    scales = {"step_mult": repr(weights.step_mult), "exp_mult": repr(weights.exp_mult)}
    replace_atomic(Path(path), lambda temporary: save_file(tensors, temporary, {**weights.about, **scales}))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays), {}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, BadZipFile, zlib.error, ValueError, TypeError, OSError, EOFError) as error:
        raise InputError(f"weights must be a .safetensors or .npz file, {path} is none: {error}") from None


def _tensor(name: str, given: Any) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
        return tensor.detach().to("cpu", torch.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"weights[{name!r}] must be an array of numbers: {error}") from None


def _flat(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return found


def _layers(found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    ends = {name.replace("/", ".").split("network.")[-1].split(".nn.")[-1].lstrip("~."): name for name in found}
    last = {end.split(".")[-1]: name for end, name in ends.items()}
    pylo = ["input", *(f"linear_{index}" for index in range(len(found))), "output"]
    names = [(ends[f"{each}.weight"], ends.get(f"{each}.bias", "")) for each in pylo if f"{each}.weight" in ends]
    if names:
        return tuple(found[name] for pair in names for name in pair if name)
    places = [index for index in range(len(found)) if {f"w{index}", f"b{index}"} <= {*last}]
    pairs = [(last[f"w{index}"], last[f"b{index}"]) for index in places]
    return tuple(each for w, b in pairs for each in (found[w].T.contiguous(), found[b]))


def _deltas(found: Mapping[str, Tensor]) -> Tensor:
    parts = []
    for name, default in PYLO_DELTAS.items():
        given = [each for key, each in found.items() if key.replace("/", ".").split(".")[-1] == name]
        parts.append(given[0].reshape(-1) if given else torch.tensor(default, device="cpu"))
        if len(parts[-1]) != len(default):
            raise InputError(f"{name} must hold {len(default)} numbers, got {len(parts[-1])}")
    return torch.cat(parts)


def _check(layers: tuple[Tensor, ...], deltas: Tensor) -> None:
    shapes = [tuple(each.shape) for each in layers]
    sizes = [INPUTS, *(shape[0] for shape in shapes[1:-2:2]), 2]
    right = [shape for inputs, outputs in pairwise(sizes) for shape in ((outputs, inputs), (outputs,))]
    if len(layers) < 4 or shapes != right:
        raise InputError(
            f"weights must be layers of {INPUTS} inputs, hidden sizes and 2 outputs: PyLO's (32, 39), (32,), (32, 32), "
            f"(32,), (2, 32), (2,) as network.input.weight and so on, or JAX's w0 (39, 32), b0, w1, ...; got {shapes}"
        )
    if not all(bool(each.isfinite().all()) for each in (*layers, deltas)):
        raise InputError("weights must be finite: the network's weights hold NaN or infinity")


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name} in the file's metadata must be a number, got {text!r}") from None
    check_not_negative(**{name: value})
    if name == "step_mult":
        check_positive(step_mult=value)
    return value
