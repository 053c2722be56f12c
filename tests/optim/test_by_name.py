"""Optimizers by name: torch's own and batchlab's, with groups that suit them."""

import copy
import inspect
import pickle  # noqa: TID251 - as users' trainers do

import pytest
import torch
from torch import nn

from batchlab import optim
from batchlab.core.errors import InputError
from batchlab.optim.by_name import BY_HAND, NUMBERS, create, defaults, first_step, groups, names, step_alone
from tests.spine.forked import in_ranks

TORCH = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
SETTINGS = {
    "adam": {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1},
    "adamw": {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.03, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    "sgd": {"lr": 0.03, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()


def trained(make):
    net, generator = model(), torch.Generator().manual_seed(1)
    optimizer = make(net)
    for _ in range(10):
        optimizer.zero_grad()
        net(torch.randn(8, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def by_hand(name, net, weight_decay, **settings):
    matrices = [net[0].weight, net[3].weight]
    rest = [net[0].bias, net[1].weight, net[1].bias, net[3].bias]
    both = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return TORCH[name](both, **settings)


@pytest.mark.parametrize("name", TORCH)
def test_it_takes_the_steps_of_torchs_own(name):
    """At the settings given, and at the defaults: torch's own but for SGD's momentum of 0.9."""
    ours = trained(lambda net: create(name, net, **SETTINGS[name]))
    theirs = trained(lambda net: by_hand(name, net, **SETTINGS[name]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    own = inspect.signature(TORCH[name]).parameters
    changes = {"momentum": 0.9} if name == "sgd" else {}
    plain = trained(lambda net: by_hand(name, net, own["weight_decay"].default, lr=0.03, **changes))
    torch.testing.assert_close(trained(lambda net: create(name, net, lr=0.03)), plain, rtol=1e-10, atol=1e-12)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", TORCH)
def test_the_defaults_are_what_is_used_and_torchs_own(name):
    stated, optimizer = defaults(name), create(name, model())
    assert stated["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    rest = {key: value for key, value in stated.items() if key != "weight_decay"}
    assert rest == {key: optimizer.defaults[key] for key in rest}
    plain = TORCH[name](model().parameters()).defaults
    ours = {"momentum": 0.9} if name == "sgd" else {}
    assert stated == {key: plain[key] for key in stated} | ours
    assert set(stated) == {"betas", "eps", "weight_decay", "momentum", "alpha"} & set(plain)


OURS = {
    "adagrad_norm": optim.AdaGradNorm,
    "ademamix": optim.AdEMAMix,
    "came": optim.CAME,
    "dmuon": optim.DMuon,
    "lamb": optim.LAMB,
    "lars": optim.LARS,
    "lion": optim.Lion,
    "mars": optim.MARS,
    "mkor": optim.MKOR,
    "muon": optim.Muon,
    "signum": optim.Signum,
    "small_fc_lopt": optim.LearnedOptimizer,
    "vradam": optim.VRAdam,
    "vrlamb": optim.VRLAMB,
    "vrlars": optim.VRLARS,
    "vrsgd": optim.VRSGD,
}


def test_every_name_is_made():
    assert names() == sorted(TORCH | OURS)
    assert not set(BY_HAND) & set(names())


@pytest.mark.parametrize("name", OURS)
def test_ours_are_made_with_their_defaults_and_no_decay_on_vectors(name):
    optimizer = create(name, model(), lr=0.1)
    assert type(optimizer) is OURS[name]
    stated = defaults(name)
    assert set(stated) <= set(NUMBERS) and stated["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    assert all(optimizer.param_groups[0].get(key, value) == value for key, value in stated.items())
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0
    assert [n for g in optimizer.param_groups for n in g["param_names"] if "bias" in n] == [
        "0.bias",
        "1.bias",
        "3.bias",
    ]
    first_step(name)


@pytest.mark.parametrize("name", names())
def test_a_step_alone_moves_every_tensor(name):
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = create(name, net, lr=0.1)
    net(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
    step_alone(optimizer)
    assert all((a != b).any() for a, b in zip(net.parameters(), before, strict=True))


def test_muon_has_the_hidden_matrices():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    found = {name: group["use_muon"] for group in create("muon", net).param_groups for name in group["param_names"]}
    assert {name for name, used in found.items() if used} == {"1.weight"} and len(found) == 5


@pytest.mark.parametrize("name", BY_HAND)
def test_what_needs_more_than_a_model_says_how_it_is_made(name):
    with pytest.raises(InputError, match=rf"optimizer '{name}' is not made by name alone: it.*batchlab\.optim\."):
        create(name, model())
    assert getattr(optim, BY_HAND[name].split("batchlab.optim.")[1].split("(")[0])


def test_each_trained_parameter_stands_once():
    net = model()
    net[0].weight.requires_grad_(False)
    net.tied = nn.Linear(4, 1, bias=False)
    net.tied.weight = net[3].weight
    found = groups(net, 0.1)
    assert [group["weight_decay"] for group in found] == [0.1, 0.0]
    assert [[id(p) for _, p in group["params"]] for group in found] == [
        [id(net[3].weight)],
        [id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[3].bias)],
    ]
    assert [group["weight_decay"] for group in groups(net[1], 0.1)] == [0.0]


def test_the_fused_step_is_taken_where_there_is_one_and_the_caller_says_nothing():
    net = model()
    fused = {name: create(name, net).defaults.get("fused") for name in TORCH}
    assert fused == {"adam": True, "adamw": True, "rmsprop": None, "sgd": True}
    assert not create("adam", net, foreach=True).defaults["fused"]
    assert not create("adam", net, fused=False).defaults["fused"]
    net.turns = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert not create("adam", net).defaults["fused"]


def test_sparse_gradients_are_not_sent_to_the_fused_step():
    net = nn.Embedding(4, 2, sparse=True)
    before, optimizer = net.weight.detach().clone(), create("sgd", net, lr=0.1)
    net(torch.tensor([1])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before[1] - net.weight[1], torch.full((2,), 0.1))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_convolution_in_another_memory_order_resumes_from_a_state_in_this_one(name):
    """A checkpoint may hold the state in rows; torch's fused CPU step would read it as if it lay as the weights do."""
    ends = []
    for resumed in (False, True):
        net = nn.Conv2d(2, 3, 2, bias=False).to(memory_format=torch.channels_last)
        nn.init.constant_(net.weight, 1.0)
        optimizer = create(name, net, lr=0.1)
        for step in range(3):
            g = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(step))
            net.weight.grad = g.to(memory_format=torch.channels_last)
            if resumed and step == 2:
                held = optimizer.state[net.weight]
                held |= {key: each.contiguous() for key, each in held.items() if isinstance(each, torch.Tensor)}
            optimizer.step()
        ends.append(net.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    "when", ["in mid-run", "in a copy", "in one unpickled", "between runs", "back between runs", "the gradients alone"]
)
def test_a_convolution_may_change_its_memory_order(name, when):
    """The fused step, which goes through memory as it lies, is the plain one."""
    ends = []
    for options in ({}, {"foreach": False}):
        net = nn.Conv2d(4, 8, 3, bias=False)
        nn.init.constant_(net.weight, 1.0)
        net = net.to(**LAST) if when == "back between runs" else net
        optimizer = create(name, net, lr=0.1, **options)
        for step in range(6):
            if step == 3 and when == "in a copy":
                net, optimizer = copy.deepcopy((net, optimizer))
            if step == 3 and when == "in one unpickled":
                net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
            if step == 3 and when != "the gradients alone":
                net.to(memory_format=torch.contiguous_format if when.startswith("back") else torch.channels_last)
            if step == 3 and when.endswith("runs"):
                state = optimizer.state_dict()
                optimizer = create(name, net, lr=0.1, **options)
                optimizer.load_state_dict(state)
            g = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(step))
            net.weight.grad = g.to(**LAST) if when == "the gradients alone" else torch.empty_like(net.weight).copy_(g)
            optimizer.step()
        ends.append(net.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_convolution_in_no_dense_order_leaves_the_fused_step():
    ends = []
    for options in ({}, {"foreach": False}):
        net = nn.Conv2d(4, 8, 3, bias=False)
        nn.init.constant_(net.weight, 1.0)
        optimizer = create("adamw", net, lr=0.1, **options)
        for step in range(2):
            net.weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            net.weight.data = net.weight.data.repeat(1, 2, 1, 1)[:, :4]
        ends.append(net.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "net", "hyperparameters", "message"),
    [
        ("adan", nn.Linear(2, 1), {}, r"optimizer must be one of \['adagrad_norm', 'adam', .*'vrsgd'\], got 'adan'"),
        ("lars", nn.Linear(2, 1), {"lr": 1.0, "trust": 0.0}, "trust must be finite and > 0, got 0.0"),
        ("vrsgd", nn.Linear(2, 1), {"lr": -1.0}, "lr"),
        (
            "sgd",
            nn.Linear(2, 1),
            {"betas": 1, "alpha": 1},
            r"sgd takes no hyperparameter 'alpha'; it takes \['dampening', ",
        ),
        ("adamw", nn.Tanh(), {}, "the model has no parameter that requires a gradient"),
        (["sgd"], nn.Linear(2, 1), {}, r"optimizer must be one of \[.*\], got \['sgd'\]"),
        ("lamb", nn.Linear(2, 1), {}, "lamb has no learning rate of its own: give it lr"),
        ("sgd", nn.Linear(2, 1), {"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
        ("mkor", nn.Linear(2, 1), {"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
        ("vradam", nn.Linear(2, 1), {"lr": "0.1"}, "lr must be finite and >= 0, got '0.1'"),
        ("small_fc_lopt", nn.Linear(2, 1), {"lr": "0.1"}, "lr must be finite and >= 0, got '0.1'"),
        ("adamw", nn.Linear(2, 1), {"lr": True}, "lr must be finite and >= 0, got True"),
    ],
)
def test_bad_input_is_named(name, net, hyperparameters, message):
    with pytest.raises(InputError, match=message) as caught:
        create(name, net, **hyperparameters)
    assert "'params'" not in str(caught.value)
    if name not in names():
        with pytest.raises(InputError, match=message):
            defaults(name)


def _sharded_steps():
    from torch.distributed.fsdp import fully_shard

    for name in TORCH:
        plain, sharded = model(), fully_shard(model())
        for net in (plain, sharded):
            optimizer = create(name, net, lr=0.03)
            for step in range(3):
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                net(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p.data, rtol=1e-12, atol=1e-12)


def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    assert in_ranks(2, tmp_path, _sharded_steps) == [0, 0]


def test_groups_are_of_a_model():
    with pytest.raises(InputError, match="^model must be a torch.nn.Module, got list: parameter groups are made of"):
        groups([nn.Parameter(torch.ones(2))], 0.1)
