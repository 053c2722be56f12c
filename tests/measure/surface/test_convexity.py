"""The extremes of the Hessian of the mean loss against all its eigenvalues, batches of unequal size and all."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.surface.convexity import HessianMap, hessian_map
from batchlab.measure.surface.landscape import landscape
from tests.measure.surface.small import Quadratic, quadratic, quadratic_data, quadratic_loss
from tests.spine.forked import in_ranks

HERE = ([0.0], [0.0])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def labelled(sizes=(9, 5, 3, 1)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(sizes), torch.randint(3, (sum(sizes),), generator=generator).split(sizes), strict=True))


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def explicit(model, names, batch):
    """Eigenvalues of ∂²L/∂θ², θ the named parameters."""
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]

    def of(flat):
        parts = flat.split([math.prod(shape) for shape in shapes])
        own = {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, own, batch[0]), batch[1])

    at = torch.cat([parameters[name].detach().reshape(-1) for name in names])
    return torch.linalg.eigvalsh(torch.func.hessian(of)(at)).detach()


@pytest.mark.parametrize("ignore", ["biasbn", None])
def test_four_unequal_batches_give_the_extremes_of_the_mean_losss_hessian(ignore):
    model, data = network(), labelled()
    whole = tuple(torch.cat(part) for part in zip(*data, strict=True))
    names = [name for name, p in model.named_parameters() if p.ndim > 1 or ignore is None]
    values = explicit(model, names, whole)
    found = hessian_map(model, cross_entropy, data, coordinates=HERE, ignore=ignore)
    assert found.largest[0][0] == pytest.approx(float(values[-1]), rel=1e-2)
    assert found.smallest[0][0] == pytest.approx(float(values[0]), abs=1e-2 * float(values.abs().max()))
    assert found.ratios[0][0] == abs(found.smallest[0][0] / found.largest[0][0])
    assert (found.parameters, found.examples) == (len(values), 18)
    assert found.worst_residual <= 1e-2
    tight = hessian_map(model, cross_entropy, data, coordinates=HERE, ignore=ignore, tolerance=1e-9)
    assert tight.largest[0][0] == pytest.approx(float(values[-1]), rel=1e-9)
    assert tight.smallest[0][0] == pytest.approx(float(values[0]), rel=1e-7)


def test_a_quadratic_has_one_hessian_everywhere_and_a_negative_one_keeps_its_signs():
    H, data = quadratic_data()
    low, high = torch.linalg.eigvalsh(H)[[0, -1]].tolist()
    found = hessian_map(quadratic(), quadratic_loss, data, points=3, tolerance=1e-8)
    for largest, smallest in zip(found.largest, found.smallest, strict=True):
        assert largest == pytest.approx([high] * 3, rel=1e-6) and smallest == pytest.approx([low] * 3, rel=1e-6)
    saddle = [-each for each in data]
    found = hessian_map(quadratic(), quadratic_loss, saddle, coordinates=HERE, tolerance=1e-8)
    assert (found.largest[0][0], found.smallest[0][0]) == pytest.approx((-low, -high), rel=1e-6)


def test_its_plane_is_that_of_the_landscape_with_the_same_arguments():
    model, data = network(), labelled()
    seen = []

    def watching(model, batch):
        seen.append(model[0].weight.detach().clone())
        return cross_entropy(model, batch)

    hessian_map(model, watching, data[:1], points=3, max_steps=2)
    moved = {tuple(each.reshape(-1).tolist()) for each in seen}
    seen.clear()
    landscape(model, watching, data[:1], dimensions=2, points=3)
    assert moved == {tuple(each.reshape(-1).tolist()) for each in seen} and len(moved) == 9


def test_the_model_is_given_back_after_a_map_and_after_an_error():
    model, data = network(), labelled()
    model[0].weight.grad = torch.ones(6, 4, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()

    def failing(model, batch):
        if not torch.equal(model[0].weight, before[0]):
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        hessian_map(model, failing, data, points=3, span=0.1, coordinates=([0.0, 0.1], [0.0]))
    hessian_map(model, cross_entropy, data, points=3, span=0.1)
    assert all(map(torch.equal, before, model.parameters())) and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4)) and model[2].weight.grad is None


def test_a_point_where_the_hessian_is_not_finite_is_said_to_be_so():
    model = Quadratic(torch.ones(1, 2, dtype=torch.float64))
    loss = lambda m, b: torch.log(m.theta.sum()) + 0 * b.sum()  # noqa: E731
    d = {"theta": torch.ones(1, 2)}, {"theta": torch.tensor([[1.0, -1.0]])}
    found = hessian_map(model, loss, [torch.ones(2)], directions=d, coordinates=([-1.0, 0.0], [0.0]))
    assert (found.largest[0][0], found.smallest[0][0]) == (math.inf, -math.inf)
    assert math.isnan(found.ratios[0][0]) and math.isfinite(found.largest[1][0])
    assert HessianMap.from_json(found.to_json()) == found
    assert math.isfinite(found.worst_residual)


def _in_a_rank(folder):
    found = hessian_map(network(), cross_entropy, labelled(), points=3, process_group=dist.group.WORLD)
    (folder / f"{dist.get_rank()}").write_text(found.to_json())


def test_two_ranks_get_what_one_process_gets(tmp_path):
    sofar = []
    whole = hessian_map(network(), cross_entropy, labelled(), points=3, progress=sofar.append)
    assert len(sofar) == 9 and sofar[-1] == whole and math.isnan(sofar[0].largest[2][2])
    assert in_ranks(2, tmp_path, _in_a_rank, tmp_path) == [0, 0]
    for rank in range(2):
        assert HessianMap.from_json((tmp_path / f"{rank}").read_text()) == whole


def test_bad_input_is_named():
    model, data = network(), labelled()
    for options in ({"tolerance": 0.0}, {"tolerance": 1.0}, {"max_steps": 1}, {"max_steps": 2.5}):
        with pytest.raises(InputError, match=r"tolerance must lie in \(0, 1\) and max_steps be at least 2, got"):
            hessian_map(model, cross_entropy, data, **options)
    with pytest.raises(InputError, match="coordinates must be a pair of axes"):
        hessian_map(model, cross_entropy, data, coordinates=[0.0, 1.0])
