"""Four gloo ranks give the unsharded result, and a save in the middle goes on with another world size."""

from functools import partial

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from batchlab.core import c_library
from batchlab.core.errors import InputError
from batchlab.optim import LAMB, AdaGradNorm, MTAdamW, on_cpu, shell
from batchlab.testing.optimizers import same
from batchlab.testing.optimizers_spread import HOW, model_to_spread, spread, spread_equals_whole, take_steps
from tests.optim.cases import CASES, LISTED
from tests.spine.forked import in_ranks

FEW = ("lars", "lamb", "came", "mars")  # of each kind of sum: norms, rows and columns, none for vectors


def _all_equal(names, how, dtypes, steps=20):
    for name in names:
        try:
            spread_equals_whole(CASES[name], how, dtypes=dtypes, steps=steps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_two_by_two_ranks_equal_one_process(tmp_path):
    """Five steps under FSDP2 over tensor parallelism in float64; twenty, the other ways and float32 are slow."""
    assert in_ranks(4, tmp_path, _all_equal, list(CASES), "fsdp_tp", (torch.float64,), 5) == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_four_ranks_equal_one_process(how, tmp_path):
    assert in_ranks(4, tmp_path, _all_equal, list(CASES), how, (torch.float64, torch.float32), timeout=300) == [0] * 4


def _lists_equal(names, how):
    for name in names:
        spread_equals_whole(partial(LISTED[name], foreach=True), how, dtypes=(torch.float64,))


@pytest.mark.slow
def test_the_forms_for_lists_sum_over_ranks_too(tmp_path):
    assert in_ranks(4, tmp_path, _lists_equal, list(LISTED), "fsdp", timeout=300) == [0] * 4


def _fused_equal(names, how):
    for name in names:
        spread_equals_whole(partial(LISTED[name], fused=True), how, dtypes=(torch.float64, torch.float32), steps=5)


def test_kernels_over_lists_sum_over_ranks_too(tmp_path):
    assert in_ranks(4, tmp_path, _fused_equal, ["lamb", "lars"], "fsdp_tp") == [0] * 4


def _with_a_compiler_on_some(names, how):
    if torch.distributed.get_rank() % 2:
        c_library.compiler = shell.compiler = on_cpu.compiler = lambda: None
    _fused_equal(names, how)


def test_ranks_with_and_without_a_compiler_take_the_same_way(tmp_path):
    assert in_ranks(4, tmp_path, _with_a_compiler_on_some, ["lamb", "lars"], "fsdp") == [0] * 4


def test_ranks_with_unlike_parts_take_the_same_way(tmp_path, monkeypatch):
    """Of six rows a rank has two or none, on either side of what is small: all go by the whole tensor's size."""
    monkeypatch.setattr("batchlab.optim.shell.SMALL", 8)
    assert in_ranks(4, tmp_path, _all_equal, ["lamb", "lars", "mars"], "fsdp", (torch.float64,), 3) == [0] * 4


def test_a_sum_left_on_each_rank_would_be_seen(tmp_path, monkeypatch):
    """The check can fail: with norms over parts alone LAMB ends elsewhere."""
    monkeypatch.setattr("batchlab.optim.rule.sums_over", lambda requests, layouts: [each.part for each in requests])
    assert in_ranks(4, tmp_path, _all_equal, ["lamb"], "fsdp", (torch.float64,)) == [1] * 4


def _save(name, folder, how):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model, world, rank = spread(how, model_to_spread(torch.float64))
    optimizer = CASES[name](model.named_parameters())
    take_steps(model, optimizer.step, range(7), world, rank)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder / name,
    )


def _save_all(names, folder, how):
    for name in names:
        _save(name, folder, how)


def _go_on(name, folder, how):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    alone = model_to_spread(torch.float64)
    expected = take_steps(alone, CASES[name](alone.parameters()).step, range(14))
    model, world, rank = spread(how, model_to_spread(torch.float64, seed=1))
    optimizer = CASES[name](model.named_parameters())
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / name)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    same(take_steps(model, optimizer.step, range(7, 14), world, rank), expected, 1e-10)


def _go_on_all(names, folder, how):
    for name in names:
        _go_on(name, folder, how)


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_save_on_four_ranks_goes_on_on_two(names, tmp_path):
    """Through torch.distributed.checkpoint, by the names of the parameters."""
    assert in_ranks(4, tmp_path, _save_all, names, tmp_path, "fsdp", timeout=300) == [0] * 4
    assert in_ranks(2, tmp_path, _go_on_all, names, tmp_path, "fsdp", timeout=300) == [0] * 2


def _in_zero():
    w = torch.nn.Parameter(torch.ones(4, 4))
    made = partial(ZeroRedundancyOptimizer, [w], lr=0.1)
    for whole, options in ((AdaGradNorm, {}), (LAMB, {"max_grad_norm": 1.0}), (MTAdamW, {"ratios": {"a": 1.0}})):
        with pytest.raises(InputError, match="together, and ZeroRedundancyOptimizer gives each"):
            made(optimizer_class=whole, **options)
    w.grad = torch.ones(4, 4)
    made(optimizer_class=LAMB).step()


def test_what_is_over_all_tensors_is_refused_in_a_zero_redundancy_optimizer(tmp_path):
    assert in_ranks(2, tmp_path, _in_zero) == [0, 0]
