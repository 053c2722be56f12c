"""What every optimizer must keep: call each check with a function that makes yours.

    from batchlab.testing import optimizers
    for check in optimizers.CHECKS:
        check(lambda params, **options: MyOptimizer(params, lr=0.01, **options))

A check raises `AssertionError` that says what was broken. `make` takes parameters, or groups or (name, parameter) pairs
as torch's optimizers do, and options by name (`maximize`). Those in `FORMS` are for optimizers with `foreach` and
`fused`; those of `batchlab.testing.optimizers_spread` run in the ranks of a process group.

A check runs on torch's default device, from numbers that are drawn on the CPU: on a GPU within `torch.device("cuda")`.

    with torch.device("cuda"):
        check(make)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.core.errors import InputError

Make = Callable[..., torch.optim.Optimizer]
STEPS = 6


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Matrices, biases, a convolution, a norm and an embedding-like table, with the same weights for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(*parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def drawn(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers of a generator of the CPU, on the default device: the same on each."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def gradients_for(model: nn.Module, step: int) -> None:
    """Leaves the gradient of a fixed loss over the batch of that step in `.grad`, the same bit for bit each time."""
    generator = torch.Generator("cpu").manual_seed(1000 + step)
    parameter = next(model.parameters())
    x = drawn(12, 2, 8, generator=generator).to(parameter)
    y = drawn(12, 6, generator=generator).to(parameter)
    model.zero_grad()
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        (model(x) - y).square().mean().backward()
    finally:
        torch.backends.cudnn.deterministic = before


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: Iterable[int]) -> list[Tensor]:
    """The weights after the steps."""
    for step in steps:
        gradients_for(model, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float = 0.0) -> None:
    """Raises where two lists of tensors differ by more than a share of the largest entry of each tensor.

    They may lie on two devices.
    """
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, f"tensor {index}: {a.dtype} against {b.dtype}"
        gap = (a.double().to(b.device) - b.double()).abs().max().item() if a.numel() else 0.0
        scale = b.double().abs().max().item() if b.numel() else 1.0
        assert gap <= tolerance * scale, f"tensor {index} of shape {tuple(a.shape)} differs by {gap:g} of {scale:g}"


def it_trains(make: Make) -> None:
    """Every parameter moves, and two runs are equal bit for bit."""
    first, second = small_model(), small_model()
    before = [parameter.detach().clone() for parameter in first.parameters()]
    after = trained(make(first.parameters()), first, range(STEPS))
    same(after, trained(make(second.parameters()), second, range(STEPS)))
    assert all((a != b).any() for a, b in zip(after, before, strict=True)), "a parameter did not move"


def state_goes_round(make: Make) -> None:
    """Saved in the middle and loaded into a fresh optimizer, it goes on equal bit for bit; in half precision too."""
    for dtype in (torch.float64, torch.bfloat16):
        model = small_model(dtype)
        optimizer = make(model.parameters())
        trained(optimizer, model, range(STEPS))
        saved, fresh = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
        whole = trained(optimizer, model, range(STEPS, 2 * STEPS))
        resumed = make(fresh.parameters())
        resumed.load_state_dict(saved)
        same(trained(resumed, fresh, range(STEPS, 2 * STEPS)), whole)


def copies_are_equal(make: Make) -> None:
    """A deep copy of optimizer and model goes on equal bit for bit."""
    model = small_model()
    both = (make(model.parameters()), model)
    trained(*both, range(2))
    again = copy.deepcopy(both)
    same(trained(*again, range(2, STEPS)), trained(*both, range(2, STEPS)))


def state_is_plain(make: Make) -> None:
    """`state_dict` holds tensors, numbers, texts and containers of them: it can be saved without pickling objects."""

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(plain, value)) and all(map(plain, value.values()))
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype)

    model = small_model()
    optimizer = make(model.parameters())
    trained(optimizer, model, range(1))
    assert plain(optimizer.state_dict()), "state_dict holds an object"


def closures_count(make: Make) -> None:
    """A closure is evaluated with gradients on, and its loss comes back."""
    model, by_closure = small_model(), small_model()
    whole = trained(make(model.parameters()), model, range(2))
    optimizer = make(by_closure.parameters())

    def closure(step: int) -> float:
        assert torch.is_grad_enabled(), "the closure runs without gradients"
        gradients_for(by_closure, step)
        return 0.5 + step

    found = [optimizer.step(lambda step=step: closure(step)) for step in range(2)]  # type: ignore[misc]
    assert found == [0.5, 1.5], f"step returned {found} for losses of 0.5 and 1.5"
    same([parameter.detach() for parameter in by_closure.parameters()], whole)


def frozen_and_late(make: Make) -> None:
    """A parameter without a gradient stays and has no state; one that is added or freed later starts then."""
    model = small_model()
    parameters = list(model.parameters())
    optimizer = make(parameters[:2])
    parameters[0].requires_grad_(False)
    before = parameters[0].detach().clone()
    trained(optimizer, model, range(2))
    assert torch.equal(parameters[0].detach(), before), "a frozen parameter moved"
    assert not optimizer.state.get(parameters[0]), "a frozen parameter has state"
    parameters[0].requires_grad_(True)
    optimizer.add_param_group({"params": parameters[2:]})
    optimizer.add_param_group({"params": []})
    after = trained(optimizer, model, range(2, 4))
    assert (after[0] != before).any(), "a parameter freed later did not move"


def rates_are_read(make: Make) -> None:
    """A scheduler's rate holds at once: at 0 nothing moves."""
    model = small_model()
    optimizer = make(model.parameters())
    trained(optimizer, model, range(2))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if optimizer.param_groups[0].get("lr_in_momentum"):
        return  # a rate inside the momentum acts later
    same(trained(optimizer, model, range(2, 3)), before)


def maximising_mirrors(make: Make) -> None:
    """`maximize` takes the step of the negative gradient."""
    up, down = small_model(), small_model()
    climbing, falling = make(up.parameters(), maximize=True), make(down.parameters())
    for step in range(3):
        gradients_for(up, step)
        climbing.step()
        gradients_for(down, step)
        for parameter in down.parameters():
            assert parameter.grad is not None
            parameter.grad.neg_()
        falling.step()
        for one, other in zip(up.parameters(), down.parameters(), strict=True):
            one.data.copy_(other.data)  # the next gradients are taken at the same weights
    same([p.detach() for p in up.parameters()], [p.detach() for p in down.parameters()])


def odd_shapes(make: Make) -> None:
    """Numbers, single elements, empty tensors, transposed and channels-last parameters are updated as others are."""
    draw = partial(drawn, generator=torch.Generator("cpu").manual_seed(0))
    shapes = [torch.tensor(0.7), draw(1), torch.empty(0, 3), draw(5, 3).t(), draw(2, 3, 4, 4)]
    shapes[-1] = shapes[-1].to(memory_format=torch.channels_last)
    odd = [nn.Parameter(each.double()) for each in shapes]
    plain = [nn.Parameter(each.double().contiguous().clone()) for each in shapes]
    ours, theirs = make(odd), make(plain)
    for _ in range(3):
        for a, b in zip(odd, plain, strict=True):
            b.grad = draw(*b.shape).double()
            a.grad = torch.empty_like(a).copy_(b.grad)
        ours.step()
        theirs.step()
    same([p.detach() for p in odd], [p.detach() for p in plain], 1e-12)


def bad_gradients(make: Make) -> None:
    """Sparse gradients and complex parameters are refused by name; NaN is never made finite."""
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = make([("words.weight", table.weight)])
    refused(optimizer.step, "words.weight")
    turns = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    refused(lambda: make([("turns", turns)]), "turns")
    w = nn.Parameter(torch.ones(3, 2))
    optimizer = make([w])
    w.grad = torch.full((3, 2), float("nan"))
    try:
        optimizer.step()
    except ValueError:
        return
    assert not w.isfinite().any(), "a NaN gradient gave finite weights"


def refusals(make: Make) -> None:
    """A negative rate and `differentiable` are refused at once."""
    refused(lambda: make(small_model().parameters(), lr=-1.0), "lr")
    refused(lambda: make(small_model().parameters(), lr=float("nan")), "lr")
    refused(lambda: make(small_model().parameters(), differentiable=True), "differentiable")


def micro_batches_change_nothing(make: Make) -> None:
    """Gradients accumulated over eight parts of a batch take the step of the whole, to 1e-10 in float64."""
    ends = []
    for parts in (1, 8):
        model = small_model()
        optimizer = make(model.parameters())
        for step in range(3):
            x = drawn(32, 2, 8, generator=torch.Generator("cpu").manual_seed(step)).double()
            model.zero_grad()
            for each in x.chunk(parts):
                (model(each).square().mean() / parts).backward()
            optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    same(ends[1], ends[0], 1e-10)


def any_default_device(make: Make) -> None:
    """Nothing is put on the default device: where that is another than the parameters', the steps are the same."""
    ends = []
    for device in ("cpu", "meta"):
        model = small_model()
        optimizer = make([*model.parameters(), nn.Parameter(torch.ones(150, 150))])
        for step in range(2):
            gradients_for(model, step)
            with torch.device(device):
                optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    same(ends[1], ends[0])


def lists_equal_the_loop(make: Make) -> None:
    """`foreach=True` takes the loop's steps, to 1e-12 in float64."""
    loop, lists = small_model(), small_model()
    whole = trained(make(loop.parameters(), foreach=False), loop, range(STEPS))
    same(trained(make(lists.parameters(), foreach=True), lists, range(STEPS)), whole, 1e-12)


def compiled_equals_the_loop(make: Make) -> None:
    """`fused=True` takes the loop's steps, to 1e-12 in float64, under a rate that moves; on large tensors too."""
    ends = []
    for fused in (False, True):
        parameters = [*small_model().parameters(), nn.Parameter(torch.ones(150, 150, dtype=torch.float64))]
        optimizer = make(parameters, fused=fused)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        generator = torch.Generator("cpu").manual_seed(0)
        for _ in range(STEPS):
            for parameter in parameters:
                parameter.grad = drawn(*parameter.shape, generator=generator).double()
            optimizer.step()
            schedule.step()
        ends.append([parameter.detach() for parameter in parameters])
    same(ends[1], ends[0], 1e-12)


def refused(call: Callable[[], Any], word: str) -> None:
    """`call` must raise `InputError` or `ValueError` with a message that holds `word`."""
    try:
        call()
    except (InputError, ValueError) as error:
        assert word in str(error), f"the refusal does not name {word}: {error}"
    else:
        raise AssertionError(f"{word} was not refused")


CHECKS: tuple[Callable[[Make], None], ...] = (
    it_trains,
    state_goes_round,
    copies_are_equal,
    state_is_plain,
    closures_count,
    frozen_and_late,
    rates_are_read,
    maximising_mirrors,
    odd_shapes,
    bad_gradients,
    refusals,
    micro_batches_change_nothing,
    any_default_device,
)
FORMS: tuple[Callable[[Make], None], ...] = (lists_equal_the_loop, compiled_equals_the_loop)
