"""The weights of a learned optimizer: decays, layouts, files, what is refused, those that ship."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchlab.core.errors import InputError
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import (
    PYLO_DELTAS,
    SHIPPED,
    OptimizerWeights,
    fresh_weights,
    load_weights,
    save_weights,
)
from tests.optim.learned.parameters import constant, parameters


def test_the_decays_of_pylo():
    deltas = torch.tensor(sum(PYLO_DELTAS.values(), ()), dtype=torch.float64)
    start = [0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999]
    expected = [1 - math.exp(10 * (math.log(1 - b) / 10 + d)) for b, d in zip(start, deltas.tolist(), strict=True)]
    found = OptimizerWeights((), deltas).betas().tolist()
    assert found == pytest.approx(expected, abs=1e-14)
    rounded = [0.5420, 0.9584, 0.9980, 0.99889, 0.3562, 0.99663, 0.99946]  # the paper's code, to the digits known
    assert found == pytest.approx(rounded, abs=5e-5)
    clipped = OptimizerWeights((), torch.tensor([9.0, -9.0, 0, 0, 0, 0, 0])).betas()
    assert clipped[0] == 0 and clipped[1] == 1


def test_the_layouts_hold_the_same_network(tmp_path):
    """PyLO's file, JAX's nested tree and its arrays give one network; a round trip through a file loses nothing."""
    weights = fresh_weights(5)
    scaled = OptimizerWeights(weights.layers, weights.deltas, 0.02, 0.003, {"by": "me"})
    save_weights(tmp_path / "ours.safetensors", scaled)
    back = load_weights(tmp_path / "ours.safetensors")
    assert back.digest == weights.digest and (back.step_mult, back.exp_mult, back.about["by"]) == (0.02, 0.003, "me")
    names = ["input", "linear_0", "output"]
    pairs = list(zip(weights.layers[::2], weights.layers[1::2], strict=True))
    plain, tree = {}, {}
    for index, (name, (weight, bias)) in enumerate(zip(names, pairs, strict=True)):
        plain |= {f"network.{name}.weight": weight, f"network.{name}.bias": bias}
        tree |= {f"w{index}": weight.T.numpy(), f"b{index}": bias.numpy()}
    save_file(plain, tmp_path / "pylo.safetensors")
    np.savez(tmp_path / "jax.npz", **{f"nn/~/{name}": each for name, each in tree.items()})
    zeros = {"momentum_decays": np.zeros(3), "rms_decays": np.zeros(1), "adafactor_decays": np.zeros(3)}
    pylo, arrays = load_weights(tmp_path / "pylo.safetensors"), load_weights(tmp_path / "jax.npz")
    nested = load_weights({"nn": {"~": tree}} | zeros)
    for each in (pylo, nested, arrays):
        assert all(torch.equal(a, b) for a, b in zip(each.layers, weights.layers, strict=True))
    assert nested.digest == weights.digest
    assert pylo.deltas.tolist() == arrays.deltas.tolist() == pytest.approx(sum(PYLO_DELTAS.values(), ()))


def test_weights_are_on_the_cpu_whatever_the_default_device_is(tmp_path):
    """A network of PyLO's without decays takes theirs."""
    weights = fresh_weights(5)
    names = [f"network.{stage}.{kind}" for stage in ("input", "linear_0", "output") for kind in ("weight", "bias")]
    save_file(dict(zip(names, weights.layers, strict=True)), tmp_path / "pylo.safetensors")
    with torch.device("meta"):
        again, loaded = fresh_weights(5), load_weights(tmp_path / "pylo.safetensors")
    assert again.digest == weights.digest and loaded.deltas.tolist() == pytest.approx(sum(PYLO_DELTAS.values(), ()))


def test_wrong_weights_are_refused(tmp_path):
    [p] = parameters([(2,)])
    make = partial(LearnedOptimizer, [p])
    with pytest.raises(InputError, match=r"weights must be layers of 39 inputs.*\(32, 39\).*w0 \(39, 32\).*\(4, 28\)"):
        make(weights=constant(1.0, 0.0) | {"w0": torch.zeros(28, 4)})
    with pytest.raises(InputError, match=r"weights must be layers of 39 inputs.*got \[\]"):
        make(weights={"other": torch.zeros(3)})
    with pytest.raises(InputError, match="weights must be finite"):
        make(weights=constant(math.nan, 0.0))
    with pytest.raises(InputError, match="rms_decays must hold 1 numbers, got 2"):
        make(weights=constant(1.0, 0.0) | {"rms_decays": torch.zeros(2)})
    with pytest.raises(InputError, match=r"weights\['b0'\] must be an array of numbers"):
        make(weights=constant(1.0, 0.0) | {"b0": "zeros"})
    with pytest.raises(InputError, match="does not exist"):
        make(weights=tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights here")
    with pytest.raises(InputError, match=r"weights must be a \.safetensors or \.npz file"):
        make(weights=tmp_path / "text.safetensors")
    np.savez_compressed(tmp_path / "whole.npz", **constant(1.0, 0.0))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    for damaged in (b"", whole[:-30], whole[:90] + b"?" * 20 + whole[110:], (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights must be a \.safetensors or \.npz file"):
            make(weights=tmp_path / "damaged.npz")
    save_weights(tmp_path / "scale.safetensors", OptimizerWeights(fresh_weights(0).layers, torch.zeros(7), -1.0))
    with pytest.raises(InputError, match=r"step_mult must be .*, got -1\.0"):
        make(weights=tmp_path / "scale.safetensors")


def test_without_weights_the_error_says_how_to_have_them(monkeypatch, tmp_path):
    monkeypatch.setattr("batchlab.optim.learned.weights.SHIPPED", tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match=r"scripts/meta_train_optimizer\.py.*nothing is downloaded"):
        LearnedOptimizer(parameters([(2,)]))


def test_the_weights_that_ship_say_how_they_were_made():
    weights = load_weights(None)
    assert [tuple(each.shape) for each in weights.layers] == [(32, 39), (32,), (32, 32), (32,), (2, 32), (2,)]
    assert "evolution strategies" in weights.about["trained_by"] and "digits" in weights.about["trained_on"]
    assert float(weights.about["held_out_meta_loss"]) < float(weights.about["held_out_meta_loss_at_start"])
    assert SHIPPED.stat().st_size < 20_000
