"""Pairs of BatchNorms: what goes through one leaves the other bit for bit, and a plain model comes out again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.dual_batchnorm import DualBatchNorm, convert_dual_batchnorm, keep_main_batchnorm, use_bn
from tests.spine.forked import in_ranks

KINDS = {
    "1d": (nn.BatchNorm1d, (8, 4)),
    "2d": (nn.BatchNorm2d, (8, 4, 3, 3)),
    "3d": (nn.BatchNorm3d, (8, 4, 2, 3, 3)),
    "sync": (nn.SyncBatchNorm, (8, 4, 3)),
}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3)
    )


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_branch_is_the_layer_it_was_and_leaves_the_other_alone(kind):
    make, shape = KINDS[kind]
    plain = make(4)
    nn.init.normal_(plain.weight)
    pair = convert_dual_batchnorm(copy.deepcopy(plain))
    assert isinstance(pair, DualBatchNorm) and type(pair.main) is type(pair.aux) is make
    for branch, other in (("main", "aux"), ("aux", "main")):
        reference, x = copy.deepcopy(plain), torch.randn(shape) * 3 + 1
        before = tensors(pair)
        with use_bn(pair, branch):
            assert torch.equal(pair(x), reference(x))
        statistics = {"running_mean", "running_var", "num_batches_tracked"}
        assert changed(before, pair) == {f"{branch}.{name}" for name in statistics}
        assert torch.equal(getattr(pair, branch).running_var, reference.running_var)
        assert getattr(pair, branch).weight is not getattr(pair, other).weight


def test_a_model_gains_exactly_the_affine_parameters_and_the_optimizers_old_ones_stay():
    model = network()
    before = list(model.parameters())
    count = sum(p.numel() for p in before)
    assert convert_dual_batchnorm(model) is model
    after = list(model.parameters())
    assert sum(p.numel() for p in after) == count + 2 * 4 + 2 * 3
    assert {id(p) for p in before} < {id(p) for p in after}


def test_evaluation_is_by_the_main_layers_unless_told():
    plain, x = network(), torch.randn(6, 1, 8, 8)
    model = convert_dual_batchnorm(copy.deepcopy(plain))
    with use_bn(model, "aux"):
        model(x * 5 + 2)
    model.eval(), plain.eval()
    assert torch.equal(model(x), plain(x))
    with use_bn(model, "aux"):
        assert not torch.allclose(model(x), plain(x))
    with use_bn(model, "main"), use_bn(model, "aux"):
        pass
    assert torch.equal(model(x), plain(x))


def test_the_branch_is_put_back_after_an_error():
    model = convert_dual_batchnorm(network())
    with pytest.raises(ZeroDivisionError), use_bn(model, "aux"):
        raise ZeroDivisionError
    assert {layer.branch for layer in model.modules() if isinstance(layer, DualBatchNorm)} == {"main"}


def test_the_state_goes_round_and_the_plain_model_comes_out():
    torch.manual_seed(3)
    model, other = convert_dual_batchnorm(network()), convert_dual_batchnorm(network())
    for branch in ("main", "aux"):
        with use_bn(model, branch):
            model(torch.randn(6, 1, 8, 8))
    other.load_state_dict(model.state_dict())
    assert not changed(tensors(model), other)
    x = torch.randn(2, 1, 8, 8)
    expected = model.eval()(x)
    plain = keep_main_batchnorm(other).eval()
    assert plain.state_dict().keys() == network().state_dict().keys()
    assert torch.equal(plain(x), expected)
    plain_again = network().eval()
    plain_again.load_state_dict(plain.state_dict())
    assert torch.equal(plain_again(x), expected)


def test_a_layer_at_two_places_stays_one_and_pairs_are_left_alone():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Linear(3, 3), shared)})
    convert_dual_batchnorm(model)
    assert isinstance(model["a"][0], DualBatchNorm) and model["a"][0] is model["b"][1]
    names = list(model.state_dict())
    assert list(convert_dual_batchnorm(model).state_dict()) == names
    assert keep_main_batchnorm(model)["b"][1] is shared is model["a"][0]


def test_subclasses_layers_without_weights_and_models_without_batchnorm():
    class Activated(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    pair = convert_dual_batchnorm(Activated(4, affine=False, momentum=None))
    assert type(pair.aux) is Activated and pair(torch.randn(5, 4, 2, 2)).min() == 0
    assert not list(pair.parameters())
    plain = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.LayerNorm(2))
    assert not any(isinstance(layer, DualBatchNorm) for layer in convert_dual_batchnorm(plain).modules())


def test_synchronised_layers_may_be_made_after_the_pairs():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convert_dual_batchnorm(network()))
    pairs = [layer for layer in model.modules() if isinstance(layer, DualBatchNorm)]
    assert len(pairs) == 2
    assert all(type(layer) is nn.SyncBatchNorm for pair in pairs for layer in (pair.main, pair.aux))


def test_frozen_and_late_layers_keep_their_mode_and_dtype():
    layer = nn.BatchNorm1d(3).double().eval().requires_grad_(False)
    pair = convert_dual_batchnorm(nn.Sequential(layer))[0]
    assert not pair.training and not pair.aux.training and pair.aux.weight.dtype == torch.float64
    assert not any(p.requires_grad for p in pair.parameters())


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(
        InputError, match=r"^model must have its weights, but 0 is lazy: send a batch through it first$"
    ):
        convert_dual_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))
    with (
        pytest.raises(InputError, match=r"""^branch must be "main" or "aux", got 'other'$"""),
        use_bn(network(), "other"),
    ):
        pass


@pytest.mark.slow  # to load the compiler takes long
def test_a_compiled_model_is_refused():
    with pytest.raises(InputError, match=r"^model must be converted before it is wrapped, got a OptimizedModule$"):
        convert_dual_batchnorm(torch.compile(network(), backend="eager"))


def _wrapped():
    with pytest.raises(InputError, match="before it is wrapped, got a DistributedDataParallel"):
        convert_dual_batchnorm(DistributedDataParallel(network()))


def test_a_model_in_ddp_is_refused(tmp_path):
    assert in_ranks(1, tmp_path, _wrapped) == [0]


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="model must be a torch.nn.Module, got str"):
        convert_dual_batchnorm("a")
