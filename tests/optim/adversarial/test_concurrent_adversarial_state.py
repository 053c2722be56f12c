"""A run of ConAdv goes on from its state bit for bit."""

import copy

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from tests.optim.adversarial.small_network import RHO, cross_entropy, data, network


@pytest.mark.parametrize("tau", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_run_goes_on_from_its_state_bit_for_bit(tmp_path, at, tau):
    def train(model, optimizer, adversarial, batches, until):
        for batch in adversarial.batches(batches):
            optimizer.zero_grad()
            adversarial.backward(batch)
            optimizer.step()
            if adversarial.step == until:
                break

    def start():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=tau)

    whole, first, second = start(), start(), start()
    train(*whole, data(9), None)
    train(*first, data(9), at)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    assert states[2]["step"] == at and len(states[2]["adversarial"]) == min(at, tau, 9 - at)
    torch.save(states, tmp_path / "states.pt")
    for part, state in zip(second, torch.load(tmp_path / "states.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, data(9)[at:], None)
    assert all(torch.equal(p, q) for p, q in zip(whole[0].state_dict().values(), second[0].state_dict().values()))
    assert second[2].step == 9


def test_a_state_is_plain_and_belongs_to_its_data():
    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=2)
    for _ in adversarial.batches(data(9)):
        if adversarial.step == 3:
            break
    state = adversarial.state_dict()
    assert {type(value) for value in [state["tau"], state["step"], *state["steps"], *state["marks"]]} == {int}
    assert all(type(value) is torch.Tensor for value in state["adversarial"]) and state["steps"] == [3, 4]
    other = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=2)
    other.load_state_dict(state)
    with pytest.raises(
        InputError, match=r"^batch 3 is not the one that the loaded adversarial input was made of: give "
    ):
        next(other.batches(data(9)))
    other = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=1)
    with pytest.raises(InputError, match=r"^tau must be 2 as in the state, got 1$"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match=r"^state must be what state_dict\(\) gave, it lacks step, steps, adversarial"):
        other.load_state_dict({"tau": 1})
