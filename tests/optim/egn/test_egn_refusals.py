"""What EGN refuses: arguments, targets, batches, groups, numbers that are not finite."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError, NonFiniteError
from batchlab.optim.egn.egn import EGN
from tests.optim.egn.problems import batch, flat, network


def test_what_is_not_finite_moves_nothing():
    model, (x, y) = network(), batch("mse")
    optimizer, at = EGN(model, momentum=0.9), flat(model).clone()
    for bad in (math.nan, math.inf):
        for inputs, targets in ((x * bad, y), (x, y * bad)):
            with pytest.raises(NonFiniteError, match="is not finite: no weight was moved"):
                optimizer.step(inputs, targets)
    assert torch.equal(flat(model), at) and not optimizer.state
    for damping, loss in ((1.0, lambda f, y: (f[:, 0], f, f / 0)), (1e-20, "half_mse")):
        small = nn.Linear(2, 1, bias=False)
        nn.init.ones_(small.weight)
        optimizer = EGN(small, loss, damping=damping, momentum=0.9)
        with pytest.raises(NonFiniteError, match="the direction is not finite, from Q or beyond the weights' dtype"):
            optimizer.step(torch.full((3, 2), 1e-12), torch.full((3, 1), 1e35))
        assert small.weight.tolist() == [[1.0, 1.0]] and not optimizer.state
    steep = EGN(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), lr=1e38, line_search="armijo")
    nn.init.ones_(steep.model[0].weight)
    nn.init.ones_(steep.model[2].weight)
    with pytest.raises(NonFiniteError, match="the step would make the loss inf: raise damping or lower lr"):
        steep.step(torch.ones(2, 1), torch.full((2, 1), 1e15))


BAD = [
    (dict(loss="l1"), TypeError, r"loss must be one of \['binary_cross_entropy', .*or a function .* got 'l1'"),
    (dict(loss=3), TypeError, "got 3"),
    (dict(lr=-1.0), InputError, "lr must be finite and >= 0, got -1.0"),
    (dict(lr=math.nan), InputError, "lr must be finite and >= 0, got nan"),
    (dict(damping=-1.0), InputError, "damping must be finite and >= 0, got -1.0"),
    (dict(damping=math.inf), InputError, "damping must be finite and >= 0, got inf"),
    (dict(damping=0.0, loss="cross_entropy"), InputError, "damping must be finite and > 0 where Q can be singular"),
    (dict(momentum=1.0), InputError, r"momentum must lie in \[0, 1\), got 1.0"),
    (dict(momentum="0.9"), InputError, r"momentum must lie in \[0, 1\), got '0.9'"),
    (dict(solver="qr"), InputError, r"solver must be one of \['auto', 'lu', 'cholesky'\], got 'qr'"),
    (dict(line_search="wolfe"), InputError, "line_search must be one of .*, got 'wolfe'"),
    (dict(line_search=True), InputError, "line_search must be one of .*, got True"),
    (dict(adaptive_damping=True), InputError, r"adaptive_damping must be one of \[False, 'trust_region'\], got True"),
    (dict(solve_dtype=torch.float16), InputError, "solve_dtype must be one of"),
    (dict(chunk=0), InputError, "chunk must be an integer of at least 1, got 0"),
    (dict(max_rows=2.5), InputError, "max_rows must be an integer of at least 1, got 2.5"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        EGN(network(), **arguments)


def test_losses_without_curvature_are_refused():
    model, (x, y) = network(), batch("mse")
    with pytest.raises(TypeError, match=r"loss must be a function .*, got one that returns Tensor"):
        EGN(model, nn.L1Loss()).step(x, y)
    with pytest.raises(InputError, match=r"loss must return shapes \(5,\), \(5, 3\) and \(5, 3, 3\), got"):
        EGN(model, lambda f, y: (f.sum(), f, f)).step(x, y)


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        ("mse", torch.zeros(5), r"targets must have the shape of the outputs, \(5, 3\), got \(5,\)"),
        ("mse", torch.zeros(4, 3), r"as many examples, micro-batch by micro-batch, got \[5\] and \[4\]"),
        ("cross_entropy", torch.full((5,), 3), r"classes in \[0, 2\], got shape \(5,\), values from 3 to 3"),
        ("cross_entropy", torch.full((5,), -100), r"values from -100 to -100"),
        ("cross_entropy", torch.ones(5, 3), "probabilities .* whose rows sum to 1"),
        ("binary_cross_entropy", torch.full((5, 3), 2.0), r"targets in \[0, 1\], got values from 2 to 2"),
        ("mse", None, "two tensors or two lists of tensors, got Tensor and NoneType"),
        ("mse", [torch.zeros(5, 3)], "two tensors or two lists of tensors, got Tensor and list"),
    ],
)
def test_bad_targets_are_named(loss, targets, message):
    model = network()
    with pytest.raises(InputError, match=message):
        EGN(model, loss).step(batch("mse")[0], targets)


def test_empty_batches_and_large_ones_are_refused():
    model, (x, y) = network(), batch("mse")
    with pytest.raises(InputError, match=r"every rank must have at least 1 example, got \[0\]"):
        EGN(model).step(x[:0], y[:0])
    with pytest.raises(InputError, match=r"as many examples.* got \[\] and \[\]"):
        EGN(model).step([], [])
    with pytest.raises(InputError, match=r"max_rows=14 must be at least b\*c = 5 \* 3 = 15.*15 x 15 system.*GiB"):
        EGN(model, max_rows=14).step(x, y)
    with pytest.raises(InputError, match=r"b\*c = 2 \* 50000 = 100000.*about 224 GiB"):
        EGN(nn.Linear(1, 50_000), "cross_entropy").step(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64))
    EGN(model).step([x, x[:0]], [y, y[:0]])


def test_parameters_of_other_kinds_are_named():
    with pytest.raises(InputError, match=r"entry 0 of the new group is none"):
        EGN(network(), params=[nn.Parameter(torch.ones(1))])
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(InputError, match="takes real parameters that each rank holds whole, weight is torch.complex64"):
        EGN(model)
    with pytest.raises(InputError, match="model must be a plain torch.nn.Module, got list"):
        EGN(list(network().parameters()))
    frozen = network().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the param_groups requires a gradient"):
        EGN(frozen).step(*batch("mse"))


def test_groups_that_cannot_differ_are_refused_when_they_do():
    model, (x, y) = network(), batch("mse")
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.1}]
    with pytest.raises(
        InputError, match=r"lr must be the same in all param_groups with a line search, got \[1.0, 0.1\]"
    ):
        EGN(model, params=groups, line_search="armijo")
    optimizer = EGN(model, params=groups)
    optimizer.param_groups[1]["damping"] = 0.5
    with pytest.raises(InputError, match=r"damping must be the same in all param_groups, got \[1.0, 0.5\]"):
        optimizer.step(x, y)
    optimizer.param_groups[1].update(damping=1.0, lr=math.nan)
    with pytest.raises(InputError, match="lr must be finite and >= 0, got nan"):
        optimizer.step(x, y)
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(InputError, match="momentum must be the same"):
        optimizer.add_param_group({"params": [], "momentum": 0.9})
    assert len(optimizer.param_groups) == 2


def test_a_closure_that_returns_no_pair_is_refused():
    with pytest.raises(InputError, match=r"a closure must return \(inputs, targets\), got NoneType"):
        EGN(nn.Linear(2, 1)).step(lambda: None)
    with pytest.raises(InputError, match="step takes inputs and targets"):
        EGN(nn.Linear(2, 1)).step()


def test_a_batch_and_a_closure_are_one_too_many():
    x, y = torch.ones(2, 2), torch.ones(2, 1)
    with pytest.raises(InputError, match="got both"):
        EGN(nn.Linear(2, 1)).step(x, y, closure=lambda: (x, y))
