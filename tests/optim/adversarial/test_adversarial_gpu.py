"""ConcurrentAdversarial on a GPU: a stream gives the inputs of one line, bit for bit; the CPU's; states and AMP."""

import gc

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.input import adversarial_input
from tests.optim.adversarial.small_network import RHO, assert_same, by_hand, cross_entropy, data, network
from tests.optim.on_device import through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
CLIP = (-2.5, 2.5)


@pytest.fixture(autouse=True)
def _same_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def beside(accelerator):
    """The executor that works beside the step on the device."""
    return "stream" if accelerator.type == "cuda" else "thread"


def there(batches, device):
    return [(x.to(device), y.to(device)) for x, y in batches]


def inside(count):
    """Batches in the range, the last one ragged."""
    *batches, (x, y) = [(x.clamp(*CLIP), y) for x, y in data(count)]
    return [*batches, (x[:4], y[:4])]


def train(adversarial, batches, lr=0.1):
    """What was made for each batch."""
    optimizer = torch.optim.SGD(adversarial.model.parameters(), lr=lr, momentum=0.9)
    made = []
    for batch in adversarial.batches(batches):
        optimizer.zero_grad()
        adversarial.backward(batch)
        made.append(adversarial.adversarial)
        optimizer.step()
    return made


def new(device, executor="inline", tau=1, **settings):
    model = network(dropout=0.3 if settings.pop("random", False) else 0.0).to(device)
    return ConcurrentAdversarial(model, cross_entropy, **{"rho": RHO} | settings, tau=tau, executor=executor)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize("clip", [None, CLIP, "tensors"])
def test_beside_the_step_it_is_as_in_line(norm, tau, clip, accelerator, beside):
    clip = tuple(torch.tensor(end).double().to(accelerator) for end in CLIP) if clip == "tensors" else clip
    ends = []
    for executor in (beside, "inline"):
        with new(accelerator, executor, tau, norm=norm, clip=clip, random=True) as adversarial:  # dropout in training
            ends.append((train(adversarial, there(inside(7), accelerator)), adversarial.model))
    (ours, model), (theirs, twin) = ends
    assert [x is None for x in ours] == [t < tau for t in range(7)]
    assert all(map(torch.equal, ours[tau:], theirs[tau:])) and all(
        x.device.type == accelerator.type for x in ours[tau:]
    )
    assert_same(model, twin, 0.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steps_are_those_of_the_cpu(norm, accelerator, beside):
    ours, theirs = new(accelerator, beside, norm=norm), new(CPU, norm=norm)
    made, expected = train(ours, there(data(6), accelerator)), train(theirs, data(6))
    for x, y in zip(made[1:], expected[1:], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-10, atol=1e-10)
    ours.close()
    assert_same(ours.model.to(CPU), theirs.model, 1e-9)


def test_large_batches_that_nobody_else_keeps(accelerator, beside):
    """A stream that is behind must find batches, weights and noise as they were when it was given them."""

    def drawn():
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(512, 1, 5, 5, generator=generator, dtype=torch.float64)
            yield x.to(accelerator), torch.randint(3, (512,), generator=generator).to(accelerator)

    found = []
    for executor in (beside, "inline"):
        with new(accelerator, executor, 2, random=True) as adversarial:
            batches = adversarial.batches(drawn())
            for batch in batches:
                adversarial.backward(batch)
                if adversarial.step == 3:
                    break
            del batches, batch
            gc.collect()
            filler = [torch.full((512,), 2, device=accelerator) for _ in range(64)]
            found.append(adversarial.state_dict()["adversarial"])
            assert len(filler) == 64
    assert len(found[0]) == 2 and all(map(torch.equal, *found))


def test_a_state_goes_to_the_device_and_back(accelerator, beside):
    whole = new(CPU, tau=2)
    expected = train(whole, data(9), lr=0.0)
    adversarial, made = new(CPU, tau=2), []
    for low, device in ((0, CPU), (3, accelerator), (6, CPU)):
        resumed = new(device, beside if device is accelerator else "inline", 2)
        if low:
            resumed.model.load_state_dict(through_file(adversarial.model.state_dict(), where=device))
            resumed.load_state_dict(through_file(adversarial.state_dict()))
            adversarial.close()
        adversarial = resumed
        for batch in resumed.batches(there(data(9)[low:], device)):
            resumed.backward(batch)
            made.append(resumed.adversarial)
            if resumed.step == low + 3:
                break
    assert made[:2] == [None, None]
    for x, y in zip(made[2:], expected[2:], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-10, atol=1e-10)


def test_radii_for_each_channel_on_either_device(accelerator, beside):
    """As ρ/std is; where it is, it is looked at again only when it changes."""
    batches = there(data(3), accelerator)
    rho = torch.full((1, 1, 1), RHO, dtype=torch.float64)
    expected = train(new(accelerator), batches)
    for given in (rho, rho.to(accelerator)):
        with new(accelerator, beside, rho=given) as adversarial:
            made = train(adversarial, batches)
            assert all(map(torch.equal, made[1:], expected[1:]))
            given.neg_()
            with pytest.raises(InputError, match="rho must be finite"):
                train(adversarial, batches)
            given.neg_()


def test_a_gradient_scaler(accelerator, beside):
    """Its scale leaves no trace in the inputs, and the model runs in float16."""

    def loss_fn(model, batch):
        with torch.autocast(accelerator.type, torch.float16):
            return torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    made = []
    for scale in (2.0**10, 1.0):
        model = network().float().to(accelerator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(accelerator.type, init_scale=scale, enabled=scale > 1)
        with ConcurrentAdversarial(model, loss_fn, rho=RHO, norm="l2", executor=beside) as adversarial:
            for batch in adversarial.batches([(x.float().to(accelerator), y.to(accelerator)) for x, y in data(4)]):
                optimizer.zero_grad()
                terms = adversarial.backward(batch, scale=scaler.scale)
                scaler.step(optimizer)
                scaler.update()
                made.append(adversarial.adversarial)
        assert terms.total.item() == pytest.approx(terms.clean.item() + terms.adversarial.item(), rel=1e-3)
    for x, y in zip(made[1:4], made[5:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


def test_an_input_is_that_of_the_definition(accelerator):
    model = network().to(accelerator)
    batch = there(data(1), accelerator)[0]
    torch.testing.assert_close(
        adversarial_input(model, cross_entropy, batch, rho=RHO), by_hand(model, batch), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_executors_of_the_cpu_refuse_it(executor, accelerator):
    if accelerator.type == "cpu":
        executor = "stream"
    with pytest.raises(InputError, match=f"executor '{executor}' is for models on"):
        new(accelerator, executor)
