"""Per-example norms on a GPU: those of the CPU for every kind of layer, and no false alarm where TF32 or bf16 round."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms
from batchlab.measure.examples.factors import products
from batchlab.measure.examples.per_example import per_example_sq_norms
from tests.measure.examples.naive import JOBS, by_loop, cast, cross_entropy, make_job, watched_norms

pytestmark = pytest.mark.gpu
DOUBLE = torch.float64


def moved(batch, device):
    if isinstance(batch, dict):
        return {name: part.to(device) for name, part in batch.items()}
    return [part.to(device) for part in batch]


@pytest.mark.parametrize("name", JOBS)
def test_the_norms_are_those_of_the_cpu(accelerator, name):
    model, loss, batch = make_job(name)
    model, batch = model.to(DOUBLE), cast(batch, DOUBLE)
    right = by_loop(model, loss, batch)
    found = per_example_sq_norms(model.to(accelerator), loss, moved(batch, accelerator))
    assert found.checked and found.values.device.type == accelerator.type
    assert found.by_parameter.keys() == right.keys()
    for parameter, squares in right.items():
        torch.testing.assert_close(found.by_parameter[parameter].cpu(), squares, rtol=1e-8, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 2**26])
def test_no_rule_depends_on_how_many_examples_are_worked_on_at_once(accelerator, chunk):
    model, loss, batch = make_job("conv")
    model, batch = model.to(accelerator, DOUBLE), moved(cast(batch, DOUBLE), accelerator)
    whole = watched_norms(model, loss, batch).sq_norms()
    model.zero_grad()
    torch.testing.assert_close(watched_norms(model, loss, batch, memory_bytes=chunk).sq_norms(), whole)


@pytest.fixture(params=[False, True], ids=["as it is", "tf32"])
def tf32(request):
    """Matrix products in TF32, as many set it; convolutions are by default."""
    before = torch.get_float32_matmul_precision()
    if request.param:
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class Net(nn.Module):
    """Convolutions and matrix products wide enough for tensor cores."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(32, 64, 3, stride=2, groups=2), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 36, 128), nn.Tanh(), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.features(x))


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 3, 16, 16, generator=generator), torch.randint(10, (32,), generator=generator)]


def test_tf32_is_no_fault_of_the_model(accelerator, tf32):
    """The first pass checks all parameters, each other an eighth of them; 1 % is some 10 times TF32's rounding."""
    torch.manual_seed(0)
    model, batch = Net(), pictures()
    right = sum(by_loop(model.double(), cross_entropy, cast(batch, DOUBLE)).values())
    model, batch = model.float().to(accelerator), moved(batch, accelerator)
    norms = ExampleNorms(model)
    for _ in range(9):
        model.zero_grad()
        with norms.watch(32) as record:
            cross_entropy(model, batch).backward()
    torch.testing.assert_close(record.sq_norms().cpu(), right, rtol=1e-2, atol=1e-6)
    assert norms.complete
    found = per_example_sq_norms(model, cross_entropy, batch)
    torch.testing.assert_close(found.values.cpu(), right, rtol=1e-2, atol=1e-6)


def test_a_use_that_no_rule_saw_is_still_found_under_tf32(accelerator, tf32):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)) + torch.einsum("nd,ed->ne", x, self.first.weight))

    torch.manual_seed(0)
    model = Hidden().to(accelerator)
    batch = [torch.randn(16, 64, device=accelerator), torch.randint(10, (16,), device=accelerator)]
    record = watched_norms(model, cross_entropy, batch, strict=False)
    assert record.uncovered == {"first.weight": "its gradient is not the sum of its uses that were seen"}
    assert "second.weight" in record
    with pytest.raises(InputError, match="not the sum of its uses"):
        watched_norms(model, cross_entropy, batch)


@pytest.mark.parametrize("backward_too", [False, True])
def test_bf16_autocast_rounds_and_raises_no_alarm(accelerator, backward_too):
    torch.manual_seed(0)
    model, batch = Net().to(accelerator), moved(pictures(), accelerator)
    exact = watched_norms(model, cross_entropy, batch).sq_norms()
    norms = ExampleNorms(model)
    for _ in range(2):
        model.zero_grad()
        with norms.watch(32) as record, torch.autocast(accelerator.type, torch.bfloat16):
            loss = cross_entropy(model, batch)
            with torch.autocast(accelerator.type, torch.bfloat16, enabled=backward_too):
                loss.backward()
        assert record.eps == torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(record.sq_norms(), exact, rtol=0.2, atol=1e-3)
    assert not torch.equal(record.sq_norms(), exact)


def test_dropout_on_the_device_is_seen(accelerator):
    model = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.5), nn.Linear(16, 3)).to(accelerator)
    batch = [torch.randn(6, 7, device=accelerator), torch.randint(3, (6,), device=accelerator)]
    torch.manual_seed(1)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(1)
    found = per_example_sq_norms(model, cross_entropy, batch)
    assert not found.checked and "not checked" in found.notes[-1]
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    assert per_example_sq_norms(model.eval(), cross_entropy, batch).checked


def test_units_and_examples_that_repeat_a_token(accelerator):
    """Two tokens of one example meet in a row of the table: their gradients are added before they are squared."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    tokens = torch.tensor([[1, 1, 2], [3, 0, 3], [4, 4, 4]])

    def loss(model, batch):
        return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    right = sum(by_loop(model, lambda model, batch: loss(model, batch[0]), [tokens]).values())
    found = per_example_sq_norms(
        model.to(accelerator), loss, tokens.to(accelerator), units=lambda batch: 2 * len(batch)
    )
    torch.testing.assert_close(found.values.cpu(), right, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("halves", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_products_of_halves_are_summed_in_float32(accelerator, halves):
    left, right = (torch.randn(6, 2, 300, 20).to(dtype) for dtype in halves)
    exact = left.double().mT @ right.to(torch.bfloat16 if accelerator.type == "cuda" else right.dtype).double()
    found = products(left.to(accelerator), right.to(accelerator))
    assert found.dtype == torch.float32 and found.shape == exact.shape
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-4)
