"""ConAdv against plain two-pass loops, closed forms and its own bookkeeping; the same in every executor."""

import copy
import functools
import hashlib
import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import DualBatchNorm, convert_dual_batchnorm, use_bn
from batchlab.optim.adversarial.input import adversarial_input, perturbation

RHO = 0.05


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(dropout), nn.Flatten()]
    return convert_dual_batchnorm(nn.Sequential(*layers, nn.Linear(36, 3))).double()


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 1, 5, 5, generator=generator, dtype=torch.float64)
    return [(x[i], torch.randint(3, (size,), generator=generator)) for i in range(count)]


def by_hand(model, batch, norm="linf", rho=RHO):
    """x̂ with the weights of now, written out: on a copy in evaluation mode, through the auxiliary layers."""
    model = copy.deepcopy(model).eval()
    x, y = batch[0].clone().requires_grad_(), batch[1]
    with use_bn(model, "aux"):
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    g = x.grad
    step = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + rho * step).detach()


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


def ours(model, batches, tau, lr=0.1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    made, terms = [], []
    with ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=tau, **settings) as adversarial:
        for batch in adversarial.batches(batches):
            optimizer.zero_grad()
            terms.append(adversarial.backward(batch))
            made.append(adversarial.adversarial)
            optimizer.step()
    return made, terms


def assert_same(one, other, tolerance=1e-12):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)


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


def test_the_step_has_the_length_that_was_asked_for_and_raises_the_loss():
    model, (batch,) = network(), data(1, size=200)
    batch[0][:, :, 4, 4] = 0
    model[0].weight.data[:, :, 2, 2] = 0  # the last pixel has no way to the loss
    for norm, rho in (("linf", 0.05), ("l2", 0.3)):
        moved = adversarial_input(model, cross_entropy, batch, rho=rho, norm=norm) - batch[0]
        assert (moved[:, :, 4, 4] == 0).all()
        if norm == "linf":
            others = moved.flatten(1)[:, :-1].abs()
            torch.testing.assert_close(others, torch.full_like(others, rho), rtol=1e-12, atol=0)
        else:
            torch.testing.assert_close(
                moved.flatten(1).norm(dim=1), torch.full((200,), rho).double(), rtol=1e-6, atol=0
            )
        model.eval()
        with torch.no_grad(), use_bn(model, "aux"):
            before, after = (
                nn.functional.cross_entropy(model(x), batch[1], reduction="none") for x in (batch[0], batch[0] + moved)
            )
        assert (after >= before).double().mean() >= 0.95
        model.train()


def test_a_perturbation_knows_no_scale_and_hides_no_nan():
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    sign, unit = perturbation(g, 2.0), perturbation(g, 2.0, "l2")
    assert sign[:2].tolist() == [[2, -2], [0, 0]] and sign[3].tolist() == [2, 2]
    assert sign[2, 0].isnan() and sign[2, 1] == 2
    torch.testing.assert_close(unit[:2], torch.tensor([[1.2, -1.6], [0.0, 0.0]]))
    assert unit[2].isnan().all() and unit[3].isnan().any()
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(perturbation(g[:2] * scale, 2.0, "l2"), unit[:2])
    half = perturbation(torch.tensor([[6e4, 6e4, -6e4]], dtype=torch.float16), 1.0, "l2")
    assert half.dtype == torch.float16 and half[0].float().norm() == pytest.approx(1, abs=1e-3)


def test_a_nan_in_the_weights_reaches_the_loss():
    model, (batch,) = network(), data(1)
    model[0].weight.data.fill_(math.nan)
    adversarial = ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=0)
    for given in adversarial.batches([batch]):
        assert adversarial.adversarial.isnan().all()
        assert adversarial.backward(given).total.isnan()


def test_a_range_holds_and_rho_may_differ_by_channel():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.rand(50, 3, dtype=torch.float64)
    loss = functools.partial(lambda model, batch: model(batch[0]).square().mean())
    rho = torch.tensor([0.1, 0.0, 0.3])
    free = adversarial_input(model, loss, (x,), rho=rho)
    torch.testing.assert_close((free - x).abs(), rho.double().expand(50, 3), rtol=1e-12, atol=1e-15)
    held = adversarial_input(model, loss, (x,), rho=rho, clip=(0.0, torch.tensor([1.0, 1.0, 0.9])))
    assert torch.equal(held, free.clamp(torch.zeros(3).double(), torch.tensor([1.0, 1.0, 0.9]).double()))
    assert not torch.equal(held, free)


def test_preparing_leaves_everything_as_it_was():
    model = network(dropout=0.5)
    model[3].eval()  # a layer's own mode comes back too
    with use_bn(model, "aux"):
        cross_entropy(model, data(1, seed=5)[0]).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    x_hat = adversarial_input(model, cross_entropy, data(1)[0], rho=RHO)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    assert torch.equal(torch.get_rng_state(), random) and not x_hat.requires_grad
    assert [layer.training for layer in model[:5]] == [True, True, True, False, True]
    assert {layer.branch for layer in model.modules() if isinstance(layer, DualBatchNorm)} == {"main"}


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -1}, r"tau must be an integer of at least 0, got -1"),
        ({"tau": 1.0}, r"tau must be an integer of at least 0, got 1.0"),
        ({"rho": -0.1}, r"rho must be finite and >= 0, in the unit of the input, got -0.1"),
        ({"rho": math.inf}, r"rho must be finite and >= 0, in the unit of the input, got inf"),
        ({"rho": "8/255"}, r"rho must be finite and >= 0, in the unit of the input, got '8/255'"),
        ({"rho": torch.ones(3), "norm": "l2"}, r'rho must be one number for norm "l2", got a tensor of shape \(3,\)'),
        ({"norm": "l1"}, r"""norm must be "linf" or "l2", got 'l1'"""),
        ({"weights": (0, 0)}, r"weights must be two finite numbers >= 0, not both 0, got \(0, 0\)"),
        ({"weights": (1.0, math.nan)}, r"weights must be two finite numbers >= 0, not both 0, got \(1.0, nan\)"),
        ({"weights": 1.0}, r"weights must be two finite numbers >= 0, not both 0, got 1.0"),
        ({"clip": (1.0, 0.0)}, r"clip must be None or \(low, high\) with low < high, got \(1.0, 0.0\)"),
        ({"clip": 1.0}, r"clip must be None or \(low, high\) with low < high, got 1.0"),
        ({"executor": "gpu"}, r"executor must be one of inline, thread, process, stream, got 'gpu'"),
        ({"executor": "stream"}, r"executor 'stream' is for models on cuda, 0.weight is on cpu: use \"thread\", "),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        ConcurrentAdversarial(network(), cross_entropy, **{"rho": RHO} | settings)


def test_bad_models_data_and_losses_are_refused():
    with pytest.raises(InputError, match=r"^model must be a torch.nn.Module, got function$"):
        ConcurrentAdversarial(network, cross_entropy, rho=RHO)
    with pytest.raises(
        InputError, match=r"^model must have an auxiliary BatchNorm beside each, but 1 has none: call co"
    ):
        ConcurrentAdversarial(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), cross_entropy, rho=RHO)
    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=3)
    with pytest.raises(InputError, match=r"^tau must be less than the number of batches, got tau=3 for 3$"):
        next(adversarial.batches(data(3)))
    assert list(adversarial.batches([])) == []
    with pytest.raises(InputError, match=r"^loader must be an iterable of batches, got one batch$"):
        adversarial.batches(data(1)[0])
    with pytest.raises(InputError, match=r"^loader must be an iterable of batches, got <class 'int'>$"):
        adversarial.batches(3)
    with pytest.raises(
        InputError, match=r"^backward\(\) must be called inside `for batch in adversarial.batches\(load"
    ):
        adversarial.backward(data(1)[0])
    for batch, got in (
        ((torch.ones(3, dtype=torch.long),), r"torch.int64, torch.strided, shape \(3,\)"),
        (("text",), "str"),
        ((torch.ones(0, 2),), r"torch.float32, torch.strided, shape \(0, 2\)"),
        ((torch.ones(2, 2, dtype=torch.complex64),), r"torch.complex64"),
        ((torch.eye(2).to_sparse(),), r"torch.float32, torch.sparse_coo"),
    ):
        with pytest.raises(
            InputError, match=r"^the input, batch\[0\], must be a dense floating-point tensor .* got " + got
        ):
            next(adversarial.batches([batch] * 5))
    with pytest.raises(InputError, match=r"^input_key must say where the input is in a batch, got 0 for keys \['x'\]$"):
        next(adversarial.batches([{"x": torch.ones(2)}] * 5))
    with pytest.raises(InputError, match=r"^clip must hold the inputs themselves, got \(0.0, 1.0\) for inputs from -"):
        next(ConcurrentAdversarial(network(), cross_entropy, rho=RHO, clip=(0.0, 1.0)).batches(data(3)))
    batch, linear = (torch.ones(2, 3),), nn.Linear(3, 3)
    with pytest.raises(
        InputError, match=r"^loss_fn must return a scalar tensor, the mean over the batch's examples, got"
    ):
        adversarial_input(linear, lambda m, b: m(b[0]), batch, rho=RHO)
    with pytest.raises(InputError, match=r"^loss_fn must depend on the input, batch\[0\], got a loss that does not$"):
        adversarial_input(linear, lambda m, b: m.weight.sum(), batch, rho=RHO)
    with pytest.raises(InputError, match=r"^rho must broadcast against an example of shape \(3,\), got \(2,\)$"):
        adversarial_input(linear, lambda m, b: m(b[0]).mean(), batch, rho=torch.ones(2))
    batches = adversarial.batches(data(5))
    with pytest.raises(InputError, match=r"^scale must be finite or a function, got nan$"):
        adversarial.backward(next(batches), scale=math.nan)


def test_autocast_is_the_losss_own_matter():
    """Under autocast of the caller B is as without it, so that no executor differs; inside the loss it counts."""

    def lower(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    model, batch = network().float(), (data(1)[0][0].float(), data(1)[0][1])
    plain = adversarial_input(model, cross_entropy, batch, rho=RHO, norm="l2")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adversarial_input(model, cross_entropy, batch, rho=RHO, norm="l2"), plain)
    rounded = adversarial_input(model, lower, batch, rho=RHO, norm="l2")
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, atol=0.1 * RHO, rtol=0)
