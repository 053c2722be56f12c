"""μP: how initial weights, multipliers and learning rates go with width, so that tuned rates carry over to wide models.

Yang et al. 2022 (arXiv 2203.03466), in the form of Shah et al. 2025 (arXiv 2505.02222), for optimizers whose step does
not depend on the gradient's size (family "adam" of `rules.optimizer_family`). A tensor is "input" if only its fan-out
grows with width (input weights, embeddings, biases, norm gains), "hidden" if both do, "output" if only its fan-in does,
and "fixed" if neither. With base constants of order one:

             multiplier     variance at the start   learning rate
  input      √fan_out       1/fan_out               η₀/√fan_out
  hidden     1              1/fan_in                η₀/fan_in
  output     1/√fan_in      1/fan_in                η₀/√fan_in

The same without multipliers, which changes nothing that the network computes, if Adam's ε is far below the gradients:
input 1 and η₀; hidden 1/fan_in and η₀/fan_in; output 1/fan_in² and η₀/fan_in. Whether a model follows it shows in
`measure.coordinate_check`; `telescope` tunes across widths by it.

Batch size, depth and the number of steps are not in it: those move rates by rules of their own. Nor is weight decay:
where it is decoupled and multiplied by the rate, a hidden tensor's falls with its rate. Attention scores need 1/d_head,
not 1/√d_head, where d_head grows. Not for SGD, whose rates go otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.rules.telescope import Telescope as Telescope
from batchlab.rules.telescope import telescope as telescope

Kind = Literal["input", "hidden", "output", "fixed"]
MuonScale = Literal["original", "match_rms_adamw"]

_KINDS = ("input", "hidden", "output", "fixed")


class TensorRule(NamedTuple):
    """multiplier: of the tensor where it is used. variance: of its entries at the start. learning_rate: of its entries.

    Of `tensor_rule` with base constants of 1; of `width_factors` and `table` what to multiply the base model's own by.
    """

    multiplier: float
    variance: float
    learning_rate: float


def tensor_rule(kind: Kind, fan_in: float, fan_out: float, *, multipliers: bool = True) -> TensorRule:
    """The row of the table for one tensor: y = multiplier·W·x, W (fan_out, fan_in).

    multipliers: as published; else the same network without them. A "fixed" tensor keeps 1, 1, 1.

    >>> tensor_rule("output", 256, 10), tensor_rule("output", 256, 10, multipliers=False).learning_rate
    (TensorRule(multiplier=0.0625, variance=0.00390625, learning_rate=0.0625), 0.00390625)
    """
    check_positive(fan_in=fan_in, fan_out=fan_out)
    if kind not in _KINDS:
        raise InputError(f"kind must be one of {list(_KINDS)}, got {kind!r}")
    if kind == "hidden":
        return TensorRule(1.0, 1 / fan_in, 1 / fan_in)
    if kind == "fixed":
        return TensorRule(1.0, 1.0, 1.0)
    n = fan_out if kind == "input" else fan_in
    rule = TensorRule(n**0.5 if kind == "input" else n**-0.5, 1 / n, n**-0.5)
    a = rule.multiplier
    return rule if multipliers else TensorRule(1.0, rule.variance * a**2, rule.learning_rate * a)


def width_factors(kind: Kind, fan_in_ratio: float, fan_out_ratio: float, *, multipliers: bool = False) -> TensorRule:
    """By what a tensor's multiplier, variance and learning rate change from the base model to a wider one.

    fan_in_ratio, fan_out_ratio: the wider fan over the base's. variance: against the base model's own initial variance,
    not against what the wider model's layers would draw by themselves.

    >>> width_factors("hidden", 4, 4)
    TensorRule(multiplier=1.0, variance=0.25, learning_rate=0.25)
    >>> width_factors("output", 4, 1)
    TensorRule(multiplier=1.0, variance=0.0625, learning_rate=0.25)
    """
    return tensor_rule(kind, fan_in_ratio, fan_out_ratio, multipliers=multipliers)


def kind_of(base_shape: Sequence[int], shape: Sequence[int], *, embedding: bool = False) -> Kind:
    """What a tensor is, from its shape in the base and in a wider model of the same make: by which of its fans grew.

    Shapes as PyTorch has them, (fan_out, fan_in, ...), a vector (fan_out,); embedding: (entries, fan_out), as
    `nn.Embedding` has its weight. An embedding that is also the readout is an embedding.

    >>> kind_of((64, 784), (128, 784)), kind_of((64, 64), (128, 128)), kind_of((10, 64), (10, 128)), kind_of((8,), (9,))
    ('input', 'hidden', 'output', 'input')
    """
    into, out = _fan_ratios(base_shape, shape, embedding)
    return "hidden" if out != 1 != into else "input" if out != 1 else "output" if into != 1 else "fixed"


def _fan_ratios(base_shape: Sequence[int], shape: Sequence[int], embedding: bool) -> tuple[float, float]:
    """By what fan-in and fan-out grew."""
    both = f"got {tuple(base_shape)} and {tuple(shape)}"
    if len(base_shape) != len(shape):
        raise InputError(f"shape must have as many dimensions as base_shape, {both}")
    for size in (*base_shape, *shape):
        check_count(shape=size)
    ratios = [new / old for new, old in zip(shape, base_shape, strict=True)]
    if any(ratio != 1 for ratio in ratios[2:]):
        raise InputError(f"only the first two dimensions may grow with width, {both}")
    if embedding and (len(shape) != 2 or ratios[0] != 1):
        raise InputError(f"an embedding must have the shape (entries, width), with as many entries, {both}")
    out, into = ([*ratios, 1.0, 1.0])[:2]
    return (out, into) if embedding else (into, out)


def table(
    base_shapes: Mapping[str, Sequence[int]],
    shapes: Mapping[str, Sequence[int]],
    *,
    embeddings: Collection[str] = (),
    multipliers: bool = False,
) -> dict[str, TensorRule]:
    """`width_factors` of every parameter of a model, by name.

    base_shapes, shapes: name -> shape, of the base model and of the wider one, as
    `{name: tuple(p.shape) for name, p in model.named_parameters()}` gives them. embeddings: names of embeddings.

    >>> rules = table({"w": (64, 64), "b": (64,), "head": (10, 64)}, {"w": (256, 256), "b": (256,), "head": (10, 256)})
    >>> {name: rule.learning_rate for name, rule in rules.items()}
    {'w': 0.25, 'b': 1.0, 'head': 0.25}
    """
    for name, given, others in (("shapes", shapes, base_shapes), ("base_shapes", base_shapes, shapes)):
        if lacking := sorted(set(others) - set(given)):
            raise InputError(f"{name} must have the same names as the other model, and lacks {lacking[0]!r}")
    if unknown := sorted(set(embeddings) - set(shapes)):
        raise InputError(f"embeddings must be names of parameters, got {unknown[0]!r}")
    found = {}
    for name, shape in shapes.items():
        base, embedding = base_shapes[name], name in embeddings
        kind = kind_of(base, shape, embedding=embedding)
        found[name] = width_factors(kind, *_fan_ratios(base, shape, embedding), multipliers=multipliers)
    return found


def muon_rate_factor(fan_in_ratio: float, fan_out_ratio: float, *, scale: MuonScale) -> float:
    """By what the learning rate of a hidden matrix changes with width under Muon, whose step is not Adam's.

    The orthogonal update has a spectral norm of about 1, whatever the width, so that of Adam's row there is nothing to
    divide by. scale: what the optimizer multiplies it by, as `torch.optim.Muon(adjust_lr_fn=...)` names it.
    "original", √max(1, fan_out/fan_in): nothing changes. "match_rms_adamw", 0.2·√max(fan_in, fan_out): the rate falls
    with the root of that. Fans given as ratios to the base model's, both of them growing alike. Input and output
    tensors go by their own optimizer and its row; the hidden row of the table on top would correct twice.

    >>> muon_rate_factor(4, 4, scale="original"), muon_rate_factor(4, 4, scale="match_rms_adamw")
    (1.0, 0.5)
    """
    check_positive(fan_in_ratio=fan_in_ratio, fan_out_ratio=fan_out_ratio)
    if scale not in ("original", "match_rms_adamw"):
        raise InputError(f'scale must be "original" or "match_rms_adamw", got {scale!r}')
    if fan_in_ratio != fan_out_ratio:
        raise InputError(f"both fans must grow alike, got ratios of {fan_in_ratio!r} and {fan_out_ratio!r}")
    return 1.0 if scale == "original" else float(fan_in_ratio**-0.5)
