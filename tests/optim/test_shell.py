"""What all rules share: names, options, what is told of a step, loaded states, autocast, FSDP1's flat buffers."""

import copy
import gc
import math
import pickle  # noqa: TID251 - as users' trainers do to spawn ranks
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim import (
    CAME,
    LAMB,
    LARS,
    MARS,
    VRLAMB,
    AdaGradNorm,
    AdEMAMix,
    DMuon,
    Lion,
    MTAdamW,
    Muon,
    Signum,
    VRAdam,
)
from batchlab.optim.shell import RuleOptimizer
from batchlab.testing.optimizers import gradients_for, same, small_model, trained
from tests.spine.forked import in_ranks

RATED = [AdaGradNorm, AdEMAMix, CAME, LAMB, LARS, Lion, MARS, Muon, Signum]


def matrix(**options):
    return nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), **options))


def stepped(optimizer, *parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", RATED)
@pytest.mark.parametrize("lr", ["1e-3", None], ids=["text", "none"])
def test_a_rate_that_is_no_number_is_refused(kind, lr):
    """YAML reads 1e-3 as a text."""
    with pytest.raises(InputError, match=f"lr must be finite and >= 0, got {lr!r}"):
        kind([matrix()], lr=lr)


def test_a_groups_own_state_dtype_is_checked():
    with pytest.raises(InputError, match="state_dtype must be None, .*, got 'int8'"):
        Lion([{"params": [matrix()], "state_dtype": "int8"}])
    a, b = matrix(), matrix()
    optimizer = stepped(Lion([{"params": [a], "state_dtype": "bfloat16"}, {"params": [b]}]), a, b)
    assert [optimizer.state[p]["exp_avg"].dtype for p in (a, b)] == [torch.bfloat16, torch.float32]


def test_parameters_without_names_are_told_apart_over_groups():
    a, b = matrix(), nn.Parameter(torch.ones(4, 4))
    found = stepped(LAMB([{"params": [a]}, {"params": [b]}], lr=0.1), a, b).report()
    assert list(found) == ["parameter 0 of shape (4, 4)", "parameter 1 of shape (4, 4)"]
    with pytest.raises(InputError, match="parameter 1 of shape"):
        LAMB([{"params": [a]}, {"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}], lr=0.1)


def test_the_ratio_is_of_what_moved_after_rounding():
    w = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Lion([w], lr=1e-4)  # an eightieth of a unit in the last place
    with optimizer.watching():
        stepped(optimizer, w)
    assert (w == 1).all() and optimizer.report()["parameter 0 of shape (4, 4)"]["update_ratio"] == 0


def test_a_step_that_is_not_taken_tells_nothing_of_the_one_before():
    w = matrix()
    optimizer = stepped(LAMB([w], lr=0.1), w)
    assert optimizer.report()
    with optimizer.watching():
        assert not optimizer.report()  # a gradient scaler skips a step by not calling it


@pytest.mark.parametrize("kind", ["lamb", "mt_adamw"])
def test_a_state_of_adamw_is_taken_up(kind):
    """Of vectors LAMB is AdamW, and MT-AdamW is with the norm for a weight: they go on as it does."""
    ours, theirs = ([nn.Parameter(torch.ones(4, dtype=torch.float64))] for _ in range(2))
    numbers = {"lr": 0.01, "weight_decay": 0.0}
    adamw = torch.optim.AdamW(theirs, **numbers)
    optimizer = LAMB(ours, eps=1e-8, **numbers) if kind == "lamb" else MTAdamW(ours, ratios={"a": 1.0}, **numbers)
    options = {} if kind == "lamb" else {"task": "a"}
    for step in range(6):
        theirs[0].grad = torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        ours[0].grad = theirs[0].grad.clone()
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
            ours[0].data.copy_(theirs[0].data)
        if step >= 3:
            if kind == "mt_adamw":
                optimizer.weights["a"] = float(ours[0].grad.norm())
            optimizer.step(**options)
        adamw.step()
    same([p.detach() for p in ours], [p.detach() for p in theirs], 1e-12)


def test_a_loaded_state_has_nothing_of_tensors_that_had_none():
    """torch.distributed.checkpoint takes an optimizer with any entry for one that has its state."""
    a, b = matrix(), matrix()
    saved = LAMB([a, b], lr=0.1).state_dict()
    fresh = LAMB([a, b], lr=0.1)
    fresh.load_state_dict(saved)
    assert not fresh.state and fresh.state_dict()["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: LAMB(p, lr=0.01),
        lambda p: LARS(p, lr=0.5, lr_in_momentum=False),
        lambda p: Muon(p, use_muon="matrices"),
    ],
    ids=["lamb", "lars", "muon"],
)
def test_a_save_before_the_first_step_changes_nothing(make):
    """torch.distributed.checkpoint makes the state by a step of zero gradients at a rate of 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    saved, plain = small_model(), small_model()
    ours, theirs = make(saved.named_parameters()), make(plain.named_parameters())
    assert get_optimizer_state_dict(saved, ours)["state"].keys() == dict(saved.named_parameters()).keys()
    same(trained(ours, saved, range(3)), trained(theirs, plain, range(3)))


def _first_steps_at_a_rate_of_zero():
    """A warm-up's first rate; the last rank holds nothing of any tensor, and must join the sums all the same."""
    from batchlab.testing.optimizers_spread import model_to_spread, spread, take_steps

    model, world, rank = spread("fsdp", model_to_spread(torch.float64))
    optimizer = LAMB(model.parameters(), lr=0.0)
    take_steps(model, optimizer.step, range(1), world, rank)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_all_ranks_count_a_first_step_at_a_rate_of_zero(tmp_path):
    assert in_ranks(4, tmp_path, _first_steps_at_a_rate_of_zero) == [0] * 4


def test_an_optimizer_goes_through_pickle():
    model = small_model()
    optimizer = LAMB(model.parameters(), lr=0.01, max_grad_norm=0.1)
    trained(optimizer, model, range(2))
    again, twin = pickle.loads(pickle.dumps((optimizer, model)))
    same(trained(again, twin, range(2, 4)), trained(optimizer, model, range(2, 4)))


@pytest.mark.parametrize(
    "make",
    [lambda p: CAME(p, lr=0.01), lambda p: Muon(p, lr=0.01, use_muon="matrices", ns_dtype=torch.float32)],
    ids=["came", "muon"],
)
def test_autocast_takes_no_product_in_half_precision(make):
    inside, outside = small_model(torch.float32), small_model(torch.float32)
    ours, theirs = make(inside.parameters()), make(outside.parameters())
    for step in range(2):
        for model in (inside, outside):
            gradients_for(model, step)
        with torch.autocast("cpu", torch.bfloat16):
            ours.step(lambda: torch.is_autocast_enabled("cpu") or pytest.fail("the closure lost its autocast"))
        theirs.step()
    same([p.detach() for p in inside.parameters()], [p.detach() for p in outside.parameters()])


def _flat_buffers():
    from torch.distributed.fsdp import FullyShardedDataParallel

    for pieces in (True, False):
        model = nn.Linear(6, 4)
        early = LAMB(model.parameters(), lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = FullyShardedDataParallel(model, use_orig_params=pieces, device_id=torch.device("cpu"))
            with pytest.raises(InputError, match="LAMB looks at whole tensors, and .*FSDP2"):
                LAMB(flat.parameters(), lr=0.01)
            flat(torch.ones(2, 6)).square().sum().backward()
        if pieces:  # made before: seen at the first step
            with pytest.raises(InputError, match="LAMB looks at whole tensors"):
                early.step()
        Lion(flat.parameters()).step()


def test_pieces_of_a_flat_buffer_are_refused_where_norms_are_taken(tmp_path):
    assert in_ranks(2, tmp_path, _flat_buffers) == [0, 0]


@pytest.mark.parametrize("make", [LAMB, LARS, Lion])
def test_nothing_is_kept_alive_between_steps(make):
    """Gradients, states and weights that are taken away after a step, to free memory, are free then."""
    w = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make([w], lr=0.1)
    for _ in range(2):
        w.grad = torch.ones(4, 4)
        optimizer.step()
    (name,) = [key for key in optimizer.state[w] if key in ("exp_avg", "momentum_buffer")]
    state, gradient, weights = optimizer.state[w][name], w.grad, w.data.untyped_storage()
    gone = [weakref.ref(each) for each in (state, gradient)]
    before = weights._weak_ref()
    optimizer.state[w][name], w.grad, w.data = state.clone(), None, w.data.clone()
    del state, gradient, weights
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert torch.UntypedStorage._expired(before)
    w.grad = torch.ones(4, 4)
    optimizer.step()


def test_states_and_weights_that_are_exchanged_are_the_ones_that_move():
    ends = []
    for exchanged in (False, True):
        w = torch.nn.Parameter(torch.linspace(1, 2, 16).view(4, 4))
        optimizer = LAMB([w], lr=0.1)
        for step in range(4):
            if exchanged and step == 2:
                w.data = w.data.clone()
                optimizer.state[w]["exp_avg"] = optimizer.state[w]["exp_avg"].clone()
            w.grad = torch.full((4, 4), 1.0 + step)
            optimizer.step()
        ends += [w.detach(), optimizer.state[w]["exp_avg"]]
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_in_the_dtype_of_the_arithmetic_are_gone_after_a_step(dtype):
    w = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = LAMB([w], lr=0.1, state_dtype=torch.bfloat16)
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert not optimizer._steady


def test_a_parameter_that_is_taken_away_is_forgotten():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Lion([{"params": [first]}, {"params": [second]}], lr=0.1)
    for _ in range(2):
        first.grad, second.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    optimizer.param_groups.pop()
    optimizer.state.pop(second)
    gone = weakref.ref(second)
    optimizer.step()
    del second
    gc.collect()
    assert gone() is None


def test_a_model_that_takes_another_dtype_goes_on_in_it():
    """Empty parameters all have one address, and one that is exchanged may get the address of the one before."""
    model = nn.ParameterList([torch.ones(3, 3), torch.empty(0)])
    optimizer = LAMB(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.state[parameter]:
                    optimizer.state[parameter][key] = optimizer.state[parameter][key].to(dtype)
        optimizer.step()
    assert model[0].dtype == torch.float64


def test_a_step_that_fails_keeps_no_gradient(monkeypatch):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = Lion([w], lr=0.1)
    w.grad = torch.ones(2)
    monkeypatch.setattr(optimizer, "_update", lambda leaves: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    gone, w.grad = weakref.ref(w.grad), None
    gc.collect()
    assert gone() is None


def test_a_state_that_is_taken_away_is_missed_by_name():
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LAMB([w], lr=0.1)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.state[w]["exp_avg"] = None
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.step()


@pytest.mark.parametrize("absent", [[], [0], [1, 2], [0, 1, 2]])
def test_tensors_that_come_and_go_are_moved_by_their_own_past(absent):
    """Beside optimizers of one tensor each."""
    names = ["a", "b", "c"]
    together, apart = ([torch.nn.Parameter(torch.linspace(1, 2, 4 + i).view(1, -1)) for i in range(3)] for _ in "12")
    one = LAMB(list(zip(names, together, strict=True)), lr=0.1)
    each = [LAMB([w], lr=0.1) for w in apart]
    for step in range(6):
        for place, (w, v) in enumerate(zip(together, apart, strict=True)):
            gone = step in (2, 3) and place in absent
            w.grad = None if gone else torch.full_like(w, 1.0 + step)
            v.grad = None if gone else torch.full_like(v, 1.0 + step)
        one.step()
        for optimizer in each:
            optimizer.step()
        assert list(one.report()) == [
            name for place, name in enumerate(names) if step not in (2, 3) or place not in absent
        ]
    for w, v in zip(together, apart, strict=True):
        torch.testing.assert_close(w, v)


def test_a_hook_that_exchanges_the_state_decides_its_dtypes_too():
    """Both parameters are in half precision, and saved in the other order."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2))
        saved = Lion([("x", first), ("y", second)], lr=0.1)
        first.grad, second.grad = torch.full_like(first, 1.0), torch.full_like(second, 100.0)
        saved.step()
        loaded = Lion([("y", second), ("x", first)], lr=0.1)
        turned = lambda which, state: state | {"state": {0: state["state"][1], 1: state["state"][0]}}  # noqa: E731
        loaded.register_load_state_dict_pre_hook(turned)
        loaded.load_state_dict(saved.state_dict())
        assert loaded.state[first]["exp_avg"].dtype == torch.float32
        ends.append([loaded.state[p]["exp_avg"][0].item() for p in (first, second)])
    assert ends[0] == pytest.approx([0.01, 1.0]) and ends[1] == pytest.approx([0.01, 1.0])


@pytest.mark.parametrize(
    ("theirs", "ours", "lacking"),
    [
        (partial(torch.optim.SGD, momentum=0.9), LARS, r"\['step'\]"),
        (torch.optim.Muon, Muon, r"\['step'\]"),
        (torch.optim.AdamW, AdEMAMix, r"\['exp_avg_slow'\]"),
    ],
)
def test_states_of_optimizers_that_keep_less_are_refused_and_nothing_is_loaded(theirs, ours, lacking):
    w = torch.nn.Parameter(torch.ones(3, 3))
    w.grad = torch.ones(3, 3)
    other, mine = theirs([w], lr=0.1), ours([("w", w)], lr=0.2)
    other.step()
    mine.step()
    before = mine.state_dict()
    with pytest.raises(InputError, match=f"that of w holds .* and lacks {lacking}"):
        mine.load_state_dict(other.state_dict())
    assert mine.param_groups[0]["lr"] == 0.2 and mine.state_dict()["state"][0] is before["state"][0]
    mine.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"betas": (1.5, 0.9)}, r"betas must be 2 numbers in \[0, 1\), got \(1.5, 0.9\)"),
        ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
        ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
    ],
)
def test_hyperparameters_that_are_refused_are_not_loaded_either(wrong, message):
    w = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = LAMB([w], lr=0.2)
    state = optimizer.state_dict()
    state["param_groups"][0] |= wrong
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.2 and not optimizer.param_groups[0]["maximize"]


@pytest.mark.parametrize("make", [LAMB, LARS, Lion, AdEMAMix, MARS, CAME, Muon])
def test_a_state_of_other_shapes_is_not_loaded(make):
    theirs, ours = [[torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 4), other)] for other in ((4, 8), (8, 4))]
    saved, optimizer = make(theirs, lr=0.1), make(ours, lr=0.1)
    for p in theirs:
        p.grad = torch.ones_like(p)
    saved.step()
    with pytest.raises(InputError, match=r"of parameter 1 of shape \(8, 4\) must have shape \(.*\), got \(.*\)"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "switch"),
    [
        (LARS, {"maximize": "no"}),
        (LARS, {"exclude_vectors": "no"}),
        (LAMB, {"bias_correction": 2}),
        (Muon, {"nesterov": "no"}),
        (Muon, {"check_finite": None}),
        (Lion, {"fused": "yes"}),
        (CAME, {"foreach": "off"}),
        (VRLAMB, {"maximize": "no"}),
    ],
)
def test_a_switch_is_no_text(make, switch):
    ((name, value),) = switch.items()
    with pytest.raises(InputError, match=f"^{name} must be True(,| or) False.*, got {value!r}$"):
        make([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **switch)


@pytest.mark.parametrize("value", [np.True_, 1, torch.tensor(True)])
def test_a_switch_of_another_library_is_one(value):
    optimizer = Muon([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, nesterov=value, maximize=value)
    assert optimizer.param_groups[0]["nesterov"] is True and optimizer.param_groups[0]["maximize"] is True


def test_a_rate_that_a_scheduler_left_below_0_is_loaded():
    ends = []
    for _ in range(2):
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = LAMB([w], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / 3)
        for _ in range(5):
            w.grad = torch.ones(3)
            optimizer.step()
            schedule.step()
        ends.append(optimizer)
    ends[1].load_state_dict(ends[0].state_dict())
    assert ends[1].param_groups[0]["lr"] < 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [Lion, AdEMAMix, MARS, VRAdam, partial(Muon, use_muon="matrices"), DMuon, Signum], ids=str
)
def test_momenta_that_move_make_no_graphs(make):
    """As `OneCycleLR` moves them: one for each size and kind of tensor, whatever the numbers."""
    parameters = [torch.nn.Parameter(torch.randn(200, 100)), torch.nn.Parameter(torch.randn(20_000))]
    optimizer = make(parameters, lr=0.01, fused=True)
    torch._dynamo.utils.counters.clear()
    for step in range(6):
        (group,) = optimizer.param_groups
        for name in ("betas", "adamw_betas"):
            if name in group:
                group[name] = (0.85 + step / 100, *group[name][1:])
        if "momentum" in group:
            group["momentum"] = 0.85 + step / 100
        for add in [optimizer.add_group] * 2 if hasattr(optimizer, "add_group") else [bool]:
            for p in parameters:
                p.grad = torch.randn_like(p)
            add()
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_a_rate_with_a_dimension_is_refused():
    with pytest.raises(InputError, match=r"a tensor without dimensions, got one of shape \(1,\)"):
        LAMB([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor([0.1]))


def test_a_sparse_gradient_in_a_later_group_counts_no_step():
    w, table = torch.nn.Parameter(torch.ones(2, 2)), nn.Embedding(3, 2, sparse=True)
    optimizer = LAMB([{"params": [w]}, {"params": table.parameters()}], lr=0.1)
    w.grad = torch.ones(2, 2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="got a sparse one of parameter 1"):
        optimizer.step()
    assert not optimizer.state


def test_infinite_rates_are_refused():
    for numbers in ({"lr": math.inf}, {"lr": 0.1, "weight_decay": math.inf}):
        with pytest.raises(InputError, match="must be finite and >= 0, got inf"):
            LAMB([torch.nn.Parameter(torch.ones(2))], **numbers)
    with pytest.raises(InputError, match=r"state_dtype must be None, .* got \[1\]"):
        Lion([torch.nn.Parameter(torch.ones(2))], lr=0.1, state_dtype=[1])


def rateless_(w, g, *, rho):
    w.sub_(g, alpha=rho)


class Rateless(RuleOptimizer):
    """A rule of a user's own, which has no rate."""

    def __init__(self, params, rho=0.5):
        super().__init__(params, {"rho": rho})

    def forms(self, group):
        return rateless_, None

    def numbers(self, leaf, group):
        return {"rho": group["rho"]}


def test_a_rule_of_ones_own_needs_no_rate():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = Rateless([w])
    w.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(w.detach(), torch.full((2,), 0.5))


def test_a_load_that_fails_in_any_way_leaves_all_as_it_was_and_is_seen_by_no_hook(monkeypatch):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer, heard = LAMB([w], lr=0.1), []
    w.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"lr": 5.0}
    before = optimizer.state[w]["exp_avg"]
    optimizer.register_load_state_dict_post_hook(lambda _: heard.append(1))
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(LAMB, "new_state", lambda *_: (_ for _ in ()).throw(MemoryError()))
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.state[w]["exp_avg"] is before and not heard
    state["param_groups"][0]["state_dtype"] = "nonsense"
    with pytest.raises(InputError, match="state_dtype must be None"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1 and not heard


def test_a_step_for_whose_state_there_is_no_memory_counts_nothing_and_holds_nothing(monkeypatch):
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = LAMB([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones(2)
    optimizer.step()
    second.grad, gone = torch.ones(2), weakref.ref(first.grad)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(LAMB, "new_state", lambda *_: (_ for _ in ()).throw(MemoryError()))
        optimizer.step()
    assert optimizer.state[first]["step"] == 1
    first.grad = None
    gc.collect()
    assert gone() is None
