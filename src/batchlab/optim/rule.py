"""Rules: what an optimizer does to one tensor, written as in its source from top to bottom, and how they are run.

Where a rule needs a sum over the whole tensor it yields the sum over the part at hand and is sent the sum over all
parts, so that the same lines serve a plain tensor and a DTensor; what sums cannot give it asks of whole tensors
(`Whole`). It yields in statements of their own, outside loops over Python's lists: the compiler of torch 2.11 loses
what else is at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from batchlab.optim.moments import scalar
from batchlab.parallel.owners import Whole, at_owners
from batchlab.parallel.sums import Layout, sums_over

Rule = Generator[Any, Any, "dict[str, Tensor] | None"]
Form = Callable[..., "Rule | None"]  # a rule that needs no sum is a plain function
Numbers = dict[str, Any]
Marked = TypeVar("Marked", bound=Form)


@dataclass(frozen=True)
class Sum:
    """A request of a rule: Σ over the whole tensor of what `part` sums over this rank's part of it.

    over: the tensor's dimensions that were summed, for a sum that leaves the others; None for all of them.
    """

    part: Tensor
    over: tuple[int, ...] | None = None

    def here(self) -> Tensor:
        """The answer where the part is the whole tensor."""
        return self.part


def squares(*tensors: Tensor) -> Sum:
    """The request for Σx² of each tensor.

    On CPUs as a dot product, which takes less time than a norm and is off by 3e-5 of 10⁷ numbers, a norm by 7e-4.
    """
    return Sum(torch.stack([_square(each) for each in tensors]))


def _square(x: Tensor) -> Tensor:
    if x.is_cpu and x.is_contiguous() and x.dtype in (torch.float32, torch.float64):
        x = x.view(-1)
        return torch.dot(x, x)
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.square()


def squares_of_lists(*lists: Sequence[Tensor]) -> Sum:
    """The request of a `foreach` form: a row of Σx² for each list."""
    return Sum(torch.stack([torch.stack(torch._foreach_norm(list(each))).square() for each in lists]))


def alone(form: Form, *tensors: Any, **numbers: Any) -> dict[str, Tensor] | None:
    """Runs a rule on plain tensors, where the part at hand is the whole."""
    rule = form(*tensors, **numbers)
    if rule is None:
        return None
    try:
        request = next(rule)
        while True:
            request = rule.send(request.here())
    except StopIteration as end:
        return cast("dict[str, Tensor] | None", end.value)


def weights_of_lerp(*names: str) -> Callable[[Marked], Marked]:
    """Marks numbers of a rule that it takes as tensors too, and that its compiled form must be given as such.

    Other numbers may move from step to step; for each weight of a `lerp` the compiler would make another graph.
    """

    def mark(form: Marked) -> Marked:
        cast(Any, form).as_tensors = names
        return form

    return mark


def compiled(form: Form) -> Callable[..., dict[str, Tensor] | None]:
    """`alone` for one form, compiled: a graph for each of sizes of 1, to 4,096 and beyond, dtypes and flags."""
    weights = getattr(form, "as_tensors", ())

    def call(*tensors: Any, **numbers: Any) -> dict[str, Tensor] | None:
        like = tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]
        given = {name: scalar(numbers[name], like.dtype, like.device) for name in weights if name in numbers}
        found: dict[str, Tensor] | None = limited(*tensors, **numbers | given)
        return found

    def run(*tensors: Any, **numbers: Any) -> dict[str, Tensor] | None:
        return alone(form, *tensors, **numbers)

    run.__code__ = run.__code__.replace(co_name=f"{run.__name__}_{form.__name__}")  # graphs are counted by code
    limit: dict[str, Any] = (
        {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    )
    graphs: Any = torch.compile(run, dynamic=True, fullgraph=True, **limit)

    def limited(*tensors: Any, **numbers: Any) -> Any:
        if limit:
            return graphs(*tensors, **numbers)
        with torch._dynamo.config.patch(recompile_limit=64):
            return graphs(*tensors, **numbers)

    return call


def side_by_side(rules: Sequence[Rule], layouts: Sequence[Layout]) -> list[dict[str, Tensor] | None]:
    """Runs rules in step with one another, so that the sums of a round are one collective for each mesh."""
    results: list[dict[str, Tensor] | None] = [None] * len(rules)
    answers: dict[int, Any] = dict.fromkeys(range(len(rules)))
    while answers:
        requests: dict[int, Sum | Whole] = {}
        for index, answer in answers.items():
            try:
                requests[index] = rules[index].send(answer)
            except StopIteration as end:
                results[index] = end.value
        sums = {index: each for index, each in requests.items() if isinstance(each, Sum)}
        wholes = {index: each for index, each in requests.items() if isinstance(each, Whole)}
        answers = dict(zip(sums, sums_over(list(sums.values()), [layouts[index] for index in sums]), strict=True))
        computed = at_owners(list(wholes.values()), [layouts[index] for index in wholes])
        answers.update(zip(wholes, computed, strict=True))
    return results
