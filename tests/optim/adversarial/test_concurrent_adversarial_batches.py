"""Batches of any form, and the look ahead over a loader and its epochs."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from tests.optim.adversarial.small_network import RHO, assert_same, cross_entropy, data, network, ours

Picture = namedtuple("Picture", "label pixels")


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda x, y: [x, y], 0),
        (lambda x, y: (y, x), -1),
        (lambda x, y: {"pixels": x, "label": y}, "pixels"),
        (lambda x, y: Picture(y, x), 1),
    ],
)
def test_batches_of_any_form(wrap, key):
    """Containers keep their type, and what else is in them."""
    model, kinds = network(), []

    def loss_fn(model, batch):
        kinds.append(type(batch))
        x, y = sorted(batch.values() if isinstance(batch, dict) else batch, key=lambda part: -part.ndim)
        return cross_entropy(model, (x, y))

    batches = [wrap(*batch) for batch in data(5)]
    adversarial = ConcurrentAdversarial(model, loss_fn, rho=RHO, input_key=key)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, given in zip(adversarial.batches(batches), batches, strict=True):
        assert batch is given
        optimizer.zero_grad()
        adversarial.backward(batch)
        optimizer.step()
    expected = network()
    ours(expected, data(5), 1)
    assert_same(expected, model)
    assert set(kinds) == {type(batches[0])}


def test_a_batch_may_be_the_input_itself():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    adversarial = ConcurrentAdversarial(model, lambda m, x: (m(x) - x).square().mean(), rho=0.1, tau=0)
    for x in adversarial.batches([torch.ones(4, 3)]):
        assert adversarial.backward(x).adversarial > 0
        assert (adversarial.adversarial - x).abs().max() == pytest.approx(0.1)


def test_a_second_run_begins_anew():
    model = network()
    adversarial = ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=2)
    first = adversarial.batches(data(6))
    for _ in range(4):
        next(first)
    assert adversarial.adversarial is not None
    second = adversarial.batches(data(6))
    next(second), next(second)
    assert adversarial.adversarial is None
    with pytest.raises(InputError, match=r"^batches\(\) was called again: only its latest loop can go on$"):
        next(first)
    next(second)
    assert adversarial.adversarial is not None


def test_epochs_are_chained_and_drawn_no_more_than_tau_ahead():
    drawn = []

    def epochs():
        for epoch in range(3):
            for number, batch in enumerate(data(2, seed=epoch)):
                drawn.append((epoch, number))
                yield batch

    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=1)
    seen = []
    for step, _ in enumerate(adversarial.batches(epochs())):
        seen.append(adversarial.adversarial is None)
        assert len(drawn) == min(step + 2, 6)
    assert seen == [True] + [False] * 5


def test_a_loader_that_changes_what_it_looked_ahead_at_is_found_out():
    def one_buffer():
        x, y = data(1)[0]
        for _ in range(4):
            yield x.normal_(), y

    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=1)
    with pytest.raises(InputError, match=r"^batch 0 was changed after it was drawn: the loader must give each batch"):
        next(adversarial.batches(one_buffer()))
    message = r"^batch must be the one that batches\(\) gave out for step 0, got another or a changed one: shuffle, aug"
    batches = adversarial.batches(data(3))
    batch = next(batches)
    with pytest.raises(InputError, match=message):
        adversarial.backward(data(1, seed=9)[0])
    with pytest.raises(InputError, match=message):
        adversarial.backward((batch[0].float(), batch[1]))
    adversarial.backward((batch[0].clone(), batch[1]))
    batch[0].mul_(2)
    with pytest.raises(InputError, match=message):
        adversarial.backward(batch)
