"""ConAdv against plain two-pass loops and closed forms."""

import copy
import hashlib
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import use_bn
from tests.optim.adversarial.small_network import RHO, assert_same, by_hand, cross_entropy, data, network, ours


def naive(model, batches, tau, norm="linf", weights=(1.0, 1.0), lr=0.1):
    """Old weights kept in memory, the batch of now moved with those of τ steps ago: another order, the same maths."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    history, made = [], []
    for t, (x, y) in enumerate(batches):
        history.append(copy.deepcopy(model))
        optimizer.zero_grad()
        loss = weights[0] * cross_entropy(model, (x, y))
        if t >= tau:
            made.append(by_hand(history[t - tau], (x, y), norm))
            with use_bn(model, "aux"):
                loss = loss + weights[1] * cross_entropy(model, (made[-1], y))
        loss.backward()
        optimizer.step()
    return made


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("tau", [0, 1, 2, 5])
def test_it_is_the_naive_loop_over_old_weights(tau, norm):
    mine, theirs = network(), network()
    made, terms = ours(mine, data(20), tau, norm=norm)
    expected = naive(theirs, data(20), tau, norm)
    assert_same(mine, theirs)
    assert [x is None for x in made] == [t < tau for t in range(20)]
    torch.testing.assert_close(torch.stack(made[tau:]), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert [term.adversarial is None for term in terms] == [t < tau for t in range(20)]
    assert not any(torch.equal(p, q) for p, q in zip(mine.parameters(), network().parameters(), strict=True))


def test_weights_weigh_the_two_means():
    mine, theirs = network(), network()
    _, terms = ours(mine, data(100), 1, weights=(0.5, 0.25), lr=0.02)
    naive(theirs, data(100), 1, weights=(0.5, 0.25), lr=0.02)
    assert_same(mine, theirs)
    last = terms[-1]
    torch.testing.assert_close(last.total, 0.5 * last.clean + 0.25 * last.adversarial, rtol=1e-12, atol=0)
    assert terms[0].total == 0.5 * terms[0].clean and not last.total.requires_grad


def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize("tau", [0, 1, 2, 5])
def test_each_input_is_made_with_the_weights_of_tau_steps_before(tau, executor):
    batches, used, at_step = data(9), {}, []
    number = {x.data_ptr(): t for t, (x, _) in enumerate(batches)}

    def loss_fn(model, batch):
        if batch[0].requires_grad:  # phase B
            used[number[batch[0].data_ptr()]] = digest(model)
        return cross_entropy(model, batch)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ConcurrentAdversarial(model, loss_fn, rho=RHO, tau=tau, executor=executor) as adversarial:
        for batch in adversarial.batches(batches):
            at_step.append(digest(model))
            optimizer.zero_grad()
            adversarial.backward(batch)
            optimizer.step()
    assert len(set(at_step)) == 9
    assert used == {t: at_step[t - tau] for t in range(tau, 9)}


@pytest.mark.parametrize(("weights", "factor"), [((1.0, 1.0), 2.0), ((0.5, 0.5), 1.0)])
def test_without_a_step_the_gradient_is_the_clean_one_once_or_twice(weights, factor):
    model, (batch,) = network(), data(1)
    cross_entropy(model, batch).backward()
    clean = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = network()
    adversarial = ConcurrentAdversarial(model, cross_entropy, rho=0.0, tau=0, weights=weights)
    for given in adversarial.batches([batch]):
        adversarial.backward(given)
    for name, p in model.named_parameters():  # each layer of a pair has its own term's gradient, all else has both
        in_pair = ".main." in name or ".aux." in name
        expected = clean[name.replace(".aux.", ".main.")] * (weights[0] if in_pair else factor)
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-15)


def test_a_nan_in_the_weights_reaches_the_loss():
    model, (batch,) = network(), data(1)
    model[0].weight.data.fill_(math.nan)
    adversarial = ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=0)
    for given in adversarial.batches([batch]):
        assert adversarial.adversarial.isnan().all()
        assert adversarial.backward(given).total.isnan()


def test_training_leaves_the_main_statistics_to_clean_and_the_others_to_adversarial_inputs():
    model, plain = network(), network()
    ours(model, data(1), 0, lr=0.0)
    cross_entropy(plain, data(1)[0])
    with use_bn(plain, "aux"):
        cross_entropy(plain, (by_hand(network(), data(1)[0]), data(1)[0][1]))
    assert_same(model, plain)
    assert model[1].main.num_batches_tracked == model[1].aux.num_batches_tracked == 1


@pytest.mark.parametrize("tau", [1, 3])
def test_logistic_regression_in_closed_form(tau):
    """x̂ = x - ρ·y·sign(w), w of τ steps before, y = ±1."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    batches = [(torch.randn(7, 5).double(), torch.randint(2, (7,)).double() * 2 - 1) for _ in range(12)]
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=3.0), []
    adversarial = ConcurrentAdversarial(
        model, lambda m, b: nn.functional.softplus(-b[1] * m(b[0])[:, 0]).mean(), rho=0.2, tau=tau
    )
    for t, (x, y) in enumerate(adversarial.batches(batches)):
        seen.append(model.weight.detach().clone())
        if t >= tau:
            expected = x - 0.2 * y[:, None] * seen[t - tau].sign()
            torch.testing.assert_close(adversarial.adversarial, expected, rtol=1e-12, atol=1e-15)
        optimizer.zero_grad()
        adversarial.backward((x, y))
        optimizer.step()
    assert len({tuple(w.sign().flatten().tolist()) for w in seen}) > 1  # else old and new weights could not be told


def test_micro_batches_use_the_weights_at_the_start_of_the_update():
    """A ragged batch in pieces, τ = 2 pieces for one step, and the whole with τ = 1: without BatchNorm the same."""

    def linear():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    whole, pieces = linear(), linear()
    ours(whole, data(10), 1)
    optimizer = torch.optim.SGD(pieces.parameters(), lr=0.1, momentum=0.9)
    adversarial = ConcurrentAdversarial(pieces, cross_entropy, rho=RHO, tau=2)
    parts = [(x[cut], y[cut]) for x, y in data(10) for cut in (slice(4), slice(4, None))]
    for number, batch in enumerate(adversarial.batches(parts)):
        terms = adversarial.backward(batch, scale=len(batch[1]) / 6)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(whole, pieces)
    assert terms.total > terms.clean > 0


def test_a_scale_may_be_a_function_and_closures_and_schedulers_work():
    one, two = network(), network()
    ours(one, data(6), 1)
    optimizer = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    adversarial = ConcurrentAdversarial(two, cross_entropy, rho=RHO)
    for batch in adversarial.batches(data(6)):

        def closure(batch=batch):
            optimizer.zero_grad()
            terms = adversarial.backward(batch, scale=lambda loss: loss * 4)
            for p in two.parameters():
                if p.grad is not None:
                    p.grad /= 4
            return terms.total

        assert optimizer.step(closure) > 0
        scheduler.step()
    assert_same(one, two)


def test_activation_checkpointing_changes_nothing():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    one, two = network(), Checkpointed(network())
    for model in (one, two):
        adversarial = ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=0)
        for batch in adversarial.batches(data(1)):
            adversarial.backward(batch)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.slow  # to load the compiler takes long
def test_a_compiled_model_trains_the_same():
    one, two = network(), network()
    ours(one, data(6), 1)
    ours(torch.compile(two, backend="eager"), data(6), 1)
    assert_same(one, two)


def test_settings_are_read_at_each_step():
    model, steps = network(), []
    adversarial = ConcurrentAdversarial(model, cross_entropy, rho=0.1, tau=1)
    for t, (x, _) in enumerate(adversarial.batches(data(5))):
        if t:
            steps.append((adversarial.adversarial - x).abs().max().item())
        adversarial.rho = 0.1 * (t + 2)
    assert steps == pytest.approx([0.1, 0.2, 0.3, 0.4])
    adversarial.rho = math.nan
    with pytest.raises(InputError, match=r"^rho must be finite and >= 0, in the unit of the input, got nan$"):
        next(adversarial.batches(data(3)))
