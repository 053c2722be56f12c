"""A model that nothing shows was ever moved: its tensors, modes, graphs and generators, wrapped or on a GPU."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.measure.surface.landscape import landscape
from tests.spine.forked import in_ranks


class Everything(nn.Module):
    """Batch norm, dropout, a buffer that forward changes, tied and frozen parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(6, 1).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.scratch.mul_(1.5)
        return self.frozen(self.drop(self.again(torch.tanh(self.norm(self.first(x)))))).squeeze(1)


def noisy_loss(model, batch):
    np.random.rand()
    random.random()
    return (model(batch) - 1 + 0.1 * torch.randn(len(batch))).square().mean()


def everything():
    torch.manual_seed(3)
    model = Everything()
    model(torch.randn(16, 6))
    model.norm.eval()
    model.first.bias.grad = torch.ones(6)
    return model


def picture(model):
    """All that must come back."""
    own = [*model.parameters(), *model.buffers()]
    return (
        [t.detach().clone() for t in own], [t.data_ptr() for t in own], [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()], model.first.bias.grad, model.first.weight.grad,
        torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(),
    )  # fmt: skip


def assert_same(before, after):
    assert all(map(torch.equal, before[0], after[0])) and torch.equal(before[6], after[6])
    assert before[1:4] == after[1:4] and before[7:] == after[7:]
    assert before[4] is after[4] and before[5] is after[5] is None


DATA = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 4, 1)]


@pytest.mark.parametrize("dimensions", [1, 2])
def test_nothing_shows_that_the_model_was_moved(dimensions):
    model = everything()
    before = picture(model)
    found = landscape(model, noisy_loss, DATA, dimensions=dimensions, points=3)
    assert_same(before, picture(model))
    assert len({loss for row in found.losses for loss in row}) > 3
    again = landscape(model, noisy_loss, DATA, dimensions=dimensions, points=3)
    assert again == found  # a loss that draws random numbers gets the same ones


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("calls", [0, 1, 7])
def test_nothing_shows_after_an_interruption_either(error, calls):
    model, left = everything(), [calls]
    before = picture(model)

    def failing(model, batch):
        if not left[0]:
            raise error
        left[0] -= 1
        return noisy_loss(model, batch)

    with pytest.raises(error):
        landscape(model, failing, DATA, points=3)
    assert_same(before, picture(model))


def test_a_graph_that_the_caller_holds_stays_valid():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    (alone,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
    held = model(x).square().mean()
    landscape(model, lambda m, b: m(b).square().mean(), [x], points=3)
    held.backward()
    assert torch.equal(model[0].weight.grad, alone)


def test_the_centre_is_the_plain_evaluation_bit_for_bit():
    model = everything()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    found = landscape(model, loss, DATA, points=3, directions=2)
    model.eval()
    with torch.no_grad():
        total = 0.0
        for batch in DATA:
            total += float(loss(model, batch).double()) * len(batch)
    assert found.origin == total / 10 == found.losses[0][1] == found.losses[1][1]
    whole = landscape(model, loss, [torch.cat(DATA)], points=3, directions=2)
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(found.losses), rtol=1e-5, atol=1e-6)


def test_shared_parameters_move_once_and_frozen_ones_stay():
    model = everything().eval()
    d = {"first.weight": torch.ones(6, 6)}
    seen = []

    def watching(model, batch):
        seen.append((float(model.again.weight[0, 0].detach()), float(model.frozen.weight[0, 0])))
        return (model(batch) - 1).square().mean()

    start, frozen = float(model.again.weight[0, 0].detach()), float(model.frozen.weight[0, 0])
    landscape(model, watching, DATA[:1], directions=[d], points=3)
    assert [each for each, _ in seen] == pytest.approx([start, start - 1, start + 1], abs=1e-6)
    assert {each for _, each in seen} == {frozen}


def test_a_shuffling_loader_gives_every_point_the_same_batches_and_its_generator_back():
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(torch.randn(10, 6)), batch_size=4, shuffle=True, generator=generator)
    before, seen = generator.get_state(), []

    def loss(model, batch):
        seen.append(batch[0][0, 0].item())
        return model(batch[0]).square().mean()

    for data in (loader, DataLoader(TensorDataset(torch.randn(10, 6)), batch_size=4, shuffle=True)):
        seen.clear()
        landscape(nn.Linear(6, 1), loss, data, points=3, directions=1)
        assert seen[:3] == seen[3:6] == seen[6:9]
    assert torch.equal(generator.get_state(), before)

    def failing(model, batch):
        raise ValueError("a bad batch")

    with pytest.raises(ValueError, match="a bad batch") as held:  # while the traceback still holds the pass
        landscape(nn.Linear(6, 1), failing, loader, points=3)
    assert torch.equal(generator.get_state(), before) and held is not None


class Merging(nn.Linear):
    """An adapter that evaluation mode merges into the weights, as some do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += 1.0 if self.training and not mode else -1.0 if mode and not self.training else 0.0
        return super().train(mode)


def test_layers_that_merge_weights_in_evaluation_mode_are_left_as_they_are():
    model = Merging(6, 1)
    before = model.weight.detach().clone()
    landscape(model, lambda m, b: m(b).square().mean(), DATA, points=3, directions=1)
    assert torch.equal(model.weight, before) and model.training


def test_half_precision_is_moved_in_float32_and_given_back():
    model = nn.Linear(6, 1, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    found = landscape(
        model, lambda m, b: m(b).float().square().mean(), [torch.randn(8, 6, dtype=torch.bfloat16)], points=5
    )
    assert torch.equal(model.weight, before) and len({x for row in found.losses for x in row}) > 10


def test_compiled_and_wrapped_models_are_moved_as_the_bare_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [torch.randn(8, 6, dtype=torch.float64)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plain = landscape(model, loss, data, points=3)
    compiled = landscape(torch.compile(model, backend="eager"), loss, data, points=3)
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-12, atol=0)


def _wrapped(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    data = [torch.randn(8, 6, dtype=torch.float64)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plain = landscape(model, loss, data, points=3, directions=1)
    ddp = nn.parallel.DistributedDataParallel(model)
    if dist.get_rank() == 0:  # a forward pass of the wrapper would wait for the other rank
        assert landscape(ddp, loss, data, points=3, directions=1) == plain
    dist.barrier()
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(InputError, match="needs whole parameters, .*weight is sharded"):
        landscape(fully_shard(copy.deepcopy(model)), loss, data)


def test_a_rank_may_look_at_its_ddp_model_alone_and_sharded_models_are_refused(tmp_path):
    assert in_ranks(2, tmp_path, _wrapped, tmp_path) == [0, 0]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives_and_the_model_back(accelerator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    data = [batch.double() for batch in DATA]
    plain = landscape(model, loss, data, dimensions=2, points=5)
    before = [p.detach().clone() for p in model.to(accelerator).parameters()]
    found = landscape(model, loss, data, dimensions=2, points=5)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(plain.losses), rtol=1e-9, atol=1e-12)
    assert all(map(torch.equal, before, model.parameters()))
