"""Which torch functions use a parameter in a way whose per-example gradients are known, and what those are.

A rule has the signature of its function, after the recording `Uses` and the function's output. It names the parts of
parameters that the call used and says how their per-example gradients follow from the output's gradient. A call that
no rule can read leaves its parameters without a piece, which the recorder notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.measure.examples.conv_rules import conv
from batchlab.measure.examples.factors import Dense, Piece, matrix_factors, row_factors, wide
from batchlab.measure.examples.layer_uses import Layout, Part, Uses, View, is_source, layout_of, summed
from batchlab.measure.examples.norm_rules import batch_norm, group_norm, instance_norm, layer_norm, rms_norm


def _product(
    uses: Uses, out: Tensor, name: str, input: Tensor, weight: Any, bias: Any, *, transposed: bool = False
) -> None:
    """out = input @ weight + bias; or weightᵀ."""
    w, b = uses.view(weight), uses.view(bias)
    parts = [view.part for view in (w, b) if view]
    layout = layout_of(out.shape[:-1], uses.examples, second=uses.second)
    if (
        not parts
        or layout is None
        or uses.constant(input)
        or (w and len(w.shape) != 2)
        or (b and b.shape != out.shape[-1:])
    ):
        return
    outputs_first = w is not None and w.transposed != transposed
    a = input.detach() if w else None

    def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
        after = layout.fold(g)
        if b:
            yield b.part, summed(after)
        if w and a is not None:
            before = layout.fold(a)
            yield w.part, matrix_factors(after, before) if outputs_first else matrix_factors(before, after)

    uses.use(out, name, parts, layout, pieces, is_source(input))


def _linear(uses: Uses, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    _product(uses, out, "linear", input, weight, bias, transposed=True)


def _matmul(uses: Uses, out: Tensor, *factors: Tensor, **_: Any) -> None:
    if len(factors) == 2 and out.ndim:
        _product(uses, out, "matmul", *factors, None)


def _addmm(uses: Uses, out: Tensor, *terms: Tensor, beta: float = 1, alpha: float = 1, **_: Any) -> None:
    if beta == alpha == 1 and len(terms) == 3:
        _product(uses, out, "addmm", *terms[1:], terms[0])


def _embedding(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    w = uses.view(weight)
    if w is None or w.transposed or scale_grad_by_freq:
        return
    padding = None if padding_idx is None else padding_idx % w.shape[0]
    layout, use = layout_of(input.shape, uses.examples, second=uses.second), None
    if layout is not None:
        use = _rows(uses, out, w, input.detach(), padding, layout)
    uses.lend(out, w, input.detach(), padding, use)


def _rows(uses: Uses, out: Tensor, w: View, index: Tensor, padding: int | None, layout: Layout) -> Any:
    index = layout.fold(index, 0).long()

    def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
        right = layout.fold(g)
        if padding is not None:
            right = right.masked_fill((index == padding)[:, :, None], 0)
        yield w.part, row_factors(index, right, w.shape[0])

    use = uses.use(out, "embedding", [w.part], layout, pieces, True)
    if use is not None:
        use.index = index
    return use


def _broadcast(uses: Uses, out: Tensor, name: str, w: View, source: bool, term: Callable[[Tensor], Tensor]) -> None:
    """Every example used the whole `w` elementwise; term(g) is the gradient before it is summed over the broadcast."""
    features, n = len(w.shape), uses.examples
    layout = None
    if not w.transposed and out.shape[out.ndim - features :] == w.shape:
        layout = layout_of(out.shape[: out.ndim - features], n, second=uses.second)
    if layout is not None:
        whole = layout
        uses.use(out, name, [w.part], layout, lambda g: [(w.part, summed(whole.fold(term(g), features)))], source)
    elif not w.transposed and _rows_are(n, out) and (out.ndim > features or (out.ndim == features and w.shape[0] == 1)):
        shape = (n, *((1,) * (out.ndim - features) + tuple(w.shape))[1:])

        def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
            terms = wide(term(g))
            yield w.part, Dense(terms.sum_to_size(shape).reshape(n, *w.shape), terms)

        uses.use(out, name, [w.part], Layout(n), pieces, source)


def _rows_are(n: int, out: Tensor) -> bool:
    return out.ndim > 0 and len(out) == n


def _add(uses: Uses, out: Tensor, input: Any, other: Any, *, alpha: float = 1, **_: Any) -> None:
    _plus(uses, out, input, other, 1.0, alpha)


def _sub(uses: Uses, out: Tensor, input: Any, other: Any, *, alpha: float = 1, **_: Any) -> None:
    _plus(uses, out, input, other, 1.0, -alpha)


def _rsub(uses: Uses, out: Tensor, input: Any, other: Any, *, alpha: float = 1, **_: Any) -> None:
    _plus(uses, out, input, other, -alpha, 1.0)


def _plus(uses: Uses, out: Tensor, first: Any, second: Any, sign_first: float, sign_second: float) -> None:
    for mine, other, sign in ((first, second, sign_first), (second, first, sign_second)):
        view = uses.view(mine)
        if view is not None:
            _broadcast(uses, out, "add", view, is_source(other), lambda g, sign=sign: g * sign)  # type: ignore[misc]
        elif isinstance(mine, Tensor) and sign == 1:
            _broadcast_embedding(uses, out, mine)


def _broadcast_embedding(uses: Uses, out: Tensor, mine: Tensor) -> None:
    """An embedding without a dimension of examples, as of positions, added to each example."""
    spread = mine.ndim > 1 and (mine.ndim < out.ndim or (mine.shape[0] == 1 and mine.ndim == out.ndim))
    lent = uses.lent(mine) if spread and len(out) == uses.examples and mine.shape[-1] == out.shape[-1] else None
    if lent is not None:
        w, index, padding = lent
        _rows(uses, out, w, index.expand(out.shape[:-1]), padding, Layout(uses.examples))


def _mul(uses: Uses, out: Tensor, input: Any, other: Any, **_: Any) -> None:
    for mine, factor in ((input, other), (other, input)):
        view = uses.view(mine)
        if view is not None:
            kept = factor.detach() if isinstance(factor, Tensor) else factor
            _broadcast(uses, out, "mul", view, is_source(factor), lambda g, k=kept: wide(g) * k)  # type: ignore[misc]


def _expand(uses: Uses, out: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    view = uses.view(input)
    if view is not None:
        _broadcast(uses, out, "expand", view, True, lambda g: g)


def _same(uses: Uses, out: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    view = uses.view(input)
    if view is not None and out is not input and out.shape == input.shape:
        uses.derive(out, view)


def _transpose(uses: Uses, out: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    view, n = uses.view(input), uses.examples
    matrices = min(input.ndim, out.ndim) > 1
    if view is None and matrices and len(input) == len(out) == n and input.stride(0) != out.stride(0):
        uses.swap(input, out)
    if view is not None and input.ndim == 2 and out.shape == input.shape[::-1]:
        uses.derive(out, view._replace(transposed=not view.transposed))


def _slices(uses: Uses, out: Any, input: Any = None, *rest: Any, dim: int = 0, **_: Any) -> None:
    view = uses.view(input)
    if view is None or view.transposed or view.part.dim is not None:
        return
    start, dim = 0, (rest[1] if len(rest) > 1 else dim) % input.ndim
    for part in out:
        size = part.shape[dim]
        uses.derive(part, View(Part(view.part.place, dim, start, start + size), part.shape))
        start += size


def _getitem(uses: Uses, out: Any, input: Tensor, index: Any) -> None:
    view = uses.view(input)
    places = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(place, slice) and place.step in (None, 1) for place in places)
    if view is None or view.transposed or view.part.dim is not None or not plain:
        return
    cut = [(dim, *place.indices(input.shape[dim])[:2]) for dim, place in enumerate(places) if place != slice(None)]
    cut = [(dim, start, stop) for dim, start, stop in cut if stop - start != input.shape[dim]]
    if len(cut) > 1:
        return
    part = Part(view.part.place, *cut[0]) if cut else view.part
    uses.derive(out, View(part, out.shape))


def opened_attention(*args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward` as torch has it, but such that a function mode sees what it calls."""
    function = F.multi_head_attention_forward
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body(*args, **kwargs)


T = torch.Tensor
RULES: dict[Any, Callable[..., None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), conv),
    **dict.fromkeys((torch.matmul, torch.mm, T.matmul, T.mm, T.__matmul__), _matmul),
    **dict.fromkeys((torch.addmm, T.addmm), _addmm),
    **dict.fromkeys((torch.add, T.add, T.__add__, T.__radd__, T.add_, T.__iadd__), _add),
    **dict.fromkeys((torch.sub, T.sub, T.__sub__, T.sub_, T.__isub__), _sub),
    **dict.fromkeys((T.__rsub__, torch.rsub), _rsub),
    **dict.fromkeys((torch.mul, T.mul, T.__mul__, T.__rmul__), _mul),
    **dict.fromkeys((T.expand, T.expand_as), _expand),
    **dict.fromkeys((T.t, torch.t, T.transpose, torch.transpose), _transpose),
    **dict.fromkeys((T.permute, torch.permute, T.movedim, T.swapaxes, T.swapdims), _transpose),
    **dict.fromkeys((T.T.__get__, T.mT.__get__), _transpose),  # type: ignore[attr-defined]
    **dict.fromkeys((T.to, T.float, T.double, T.half, T.bfloat16, T.type, T.contiguous), _same),
    **dict.fromkeys((T.split, torch.split, T.chunk, torch.chunk), _slices),
    T.__getitem__: _getitem,
}
