"""The same inputs bit for bit wherever they are made; a second process that ends with its trainer and tells errors."""

import copy
import functools
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from batchlab.core.errors import BatchlabError, InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import convert_dual_batchnorm
from tests.spine.forked import in_child


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 3)]
    return convert_dual_batchnorm(nn.Sequential(*layers))


def loss_fn(model, batch):
    if (batch[1] == 99).any():
        raise ArithmeticError("a label of 99")
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, 1, 5, 5, generator=generator)
    batches = [(x[i], torch.randint(3, (6,), generator=generator)) for i in range(count)]
    return [*batches[:-1], (batches[-1][0][:4], batches[-1][1][:4])]  # the last is ragged


def new(executor, tau, norm):
    return ConcurrentAdversarial(network(), loss_fn, rho=0.1, tau=tau, norm=norm, clip=(-5.0, 5.0), executor=executor)


def train(adversarial):
    model, made = adversarial.model, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in adversarial.batches(data(9)):
        optimizer.zero_grad()
        adversarial.backward(batch)
        made.append(adversarial.adversarial)
        optimizer.step()
    return made, list(model.state_dict().values())


def assert_equal_to_inline(adversarial):
    tau = adversarial.tau
    (made, weights), (expected, reference) = train(adversarial), train(new("inline", tau, adversarial.norm))
    assert [x is None for x in made] == [t < tau for t in range(9)]
    assert all(map(torch.equal, made[tau:], expected[tau:]))
    assert all(map(torch.equal, weights, reference))
    assert len({x.sum().item() for x in made[tau:]}) == 9 - tau


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_a_thread_makes_the_same_inputs(tau, norm):
    with new("thread", tau, norm) as adversarial:
        assert_equal_to_inline(adversarial)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_a_process_makes_the_same_inputs_at_any_staleness(tau, norm):
    with new("process", tau, norm) as adversarial:
        assert_equal_to_inline(adversarial)


def gone(pid, within=60.0):
    """Whether a process ends in time; one that waits to be reaped has ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def worker():
    (child,) = [child for child in multiprocessing.active_children() if child.name == "adversarial"]
    return child.pid


def test_a_process_makes_the_same_inputs_and_tells_of_errors_there_and_of_its_end():
    adversarial = new("process", 2, "l2")
    assert_equal_to_inline(adversarial)
    batches = data(12)
    batches[3][1].fill_(99)
    pid, given = worker(), adversarial.batches(batches)
    assert [next(given) is batch for batch in batches[:3]] == [True] * 3
    with pytest.raises(
        BatchlabError, match=r"(?s)^an adversarial input could not be made in the second process:.*a lab"
    ):
        next(given)
    batches[3][1].fill_(0)
    again = adversarial.batches(batches)  # it goes on after an error
    assert next(again) is batches[0] and next(again) is batches[1]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        BatchlabError, match=r"^the process that makes adversarial inputs ended with exit code -9; if it"
    ):
        next(again), next(again), next(again)
    adversarial.close()
    adversarial.close()
    with pytest.raises(InputError, match=r"^the executor is closed: make a new ConcurrentAdversarial$"):
        next(adversarial.batches(batches))


def _trainer(folder, ending):
    if ending == "interrupted":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    adversarial = ConcurrentAdversarial(network(), loss_fn, rho=0.1, executor="process")
    batches = adversarial.batches(data(9))
    next(batches), next(batches)  # an answer came: it lives
    (folder / "pid").write_text(str(worker()))
    if ending == "dropped":
        pid = worker()
        del adversarial, batches
        assert gone(pid)
    elif ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ending == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("killed", -9),
        pytest.param("interrupted", 1, marks=pytest.mark.slow),
        pytest.param("left open", 0, marks=pytest.mark.slow),
        pytest.param("dropped", 0, marks=pytest.mark.slow),
    ],
)
def test_the_process_ends_with_its_trainer(tmp_path, ending, code):
    assert in_child(_trainer, tmp_path, ending, timeout=300) == code
    assert gone(int((tmp_path / "pid").read_text()))


def test_errors_in_the_thread_are_raised_here():
    batches = data(9)
    batches[2][1].fill_(99)
    with ConcurrentAdversarial(network(), loss_fn, rho=0.1, executor="thread") as adversarial:
        given = adversarial.batches(batches)
        next(given), next(given)
        with pytest.raises(ArithmeticError, match="a label of 99"):
            next(given)


def test_what_a_process_cannot_be_given_is_refused_before_it_begins():
    for model, loss in ((network(), lambda m, b: loss_fn(m, b)), (nn.Sequential(_Local()), loss_fn)):
        with pytest.raises(
            InputError, match=r'^executor "process" needs a loss_fn and a model that can be imported by na'
        ):
            ConcurrentAdversarial(model, loss, rho=0.1, executor="process")
    assert not [child for child in multiprocessing.active_children() if child.name == "adversarial"]


class _Local(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.function = nn.Linear(2, 2), lambda x: x


def test_copies_follow_late_changes_of_weights_and_refuse_others():
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    with ConcurrentAdversarial(model, loss_fn, rho=0.1, tau=0, executor="thread") as adversarial:
        inline = ConcurrentAdversarial(copy.deepcopy(model), loss_fn, rho=0.1, tau=0)
        batch = data(2)[0]
        next(adversarial.batches([batch]))
        with torch.no_grad():
            model[1].weight.neg_()
            inline.model[1].weight.neg_()
        next(adversarial.batches([batch])), next(inline.batches([batch]))
        assert torch.equal(adversarial.adversarial, inline.adversarial)
        model.append(nn.Linear(3, 3))
        with pytest.raises(
            InputError, match=r"^the model's parameters and buffers must stay those it was given with: mak"
        ):
            next(adversarial.batches([batch]))


@pytest.mark.slow
def test_the_callers_tensors_stay_where_they_are():
    """What is sent to the process is a copy: a tensor over a NumPy array goes on sharing its memory."""
    x = torch.zeros(4, 1, 5, 5).numpy()
    batches = [(torch.from_numpy(x), torch.zeros(4, dtype=torch.long))] * 3
    with ConcurrentAdversarial(network(), functools.partial(loss_fn), rho=0.1, executor="process") as adversarial:
        for _ in adversarial.batches(batches):
            assert adversarial.step <= 3
        x[:] = 7
        assert (batches[0][0] == 7).all()
    assert not any(p.is_shared() for p in adversarial.model.parameters())
