"""What a moved recipe warns of: each sentence where it is due, and not a step before."""

import dataclasses

import pytest

from batchlab import planner
from batchlab.core.facts import Estimate
from batchlab.planner import Recipe

# a move of 4 between powers of two, far below the noise scale, that gives no cause for anything but the rules' spread
QUIET = Recipe(
    **{"batch_size": 64, "total_examples": 10**7, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
    **{"ema_decay": 0.999, "clip_norm": 1.0, "batchnorm_momentum": 0.01, "noise_scale": 1e5, "warmup_examples": 10**5},
    train_examples=10**5,
)


def warnings(to_batch=128, base=QUIET, changes=None, **options):
    return planner.recipe(dataclasses.replace(base, **(changes or {})), to_batch, **options).warnings


def said(part, **arguments):
    found = [line for line in warnings(**arguments) if part in line]
    assert len(found) == 1, warnings(**arguments)
    return found[0]


def test_a_quiet_move_says_nothing():
    assert warnings() == ()
    assert warnings(32) == ()
    assert warnings(64) == ()


def test_rules_side_by_side():
    """Linear and sqrt are √κ apart."""
    assert "the learning-rate rules lie" not in str(warnings(128, rule="none")) + str(warnings(128, rule="linear"))
    line = said("the learning-rate rules lie a factor", to_batch=320, changes={"noise_scale": 1e9})
    assert line == (
        "the learning-rate rules lie a factor 2.24 apart: linear 0.005, sqrt 0.002236, surge 0.002236, "
        "saturating 0.005, saturating_sqrt 0.002236"
    )
    assert "linear 0.016, sqrt 0.004" in said("rules lie", to_batch=1024, changes={"noise_scale": None})


def test_far_from_one_tuning():
    assert "from one tuning" not in str(warnings(1024)) + str(warnings(4))
    assert said("from one tuning", to_batch=1025).startswith(
        "the batch moves by a factor 16.02 from one tuning: beyond"
    )
    assert "by a factor 0.03125 from one tuning" in said("from one tuning", to_batch=2)


def test_the_rate_rises():
    assert "the learning rate rises" not in str(warnings(256))
    line = said("the learning rate rises", to_batch=288, changes={"noise_scale": None})
    assert line.startswith("the learning rate rises by a factor 2.12: the rules do not know the largest stable one")


def test_no_noise_scale():
    changes = {"noise_scale": None}
    assert said("without a noise scale", changes=changes).endswith("measure it (measure.GradientNoise)")
    assert said("clip_norm stays at 1", changes=changes).endswith("the gradient's norm goes by 1/√κ = 0.707")
    assert "without a noise scale" not in str(warnings(64, changes=changes))
    unknown = Estimate(float("nan"), 0.0, float("inf"), "no signal")
    assert said("is not known", noise_scale=unknown) == "the noise scale is not known (no signal)"


def test_the_noise_scales_interval():
    line = said("interval", to_batch=256, noise_scale=Estimate(512.0, 128.0, 2048.0, "by hand"))
    laws = [planner.recipe(QUIET, 256, noise_scale=end).recipe.learning_rate for end in (128.0, 2048.0)]
    low, high = (f"{rate:.4g}" for rate in laws)
    assert line == f"over the noise scale's interval [128, 2048] the learning rate is {low} to {high}"
    unbounded = said("interval", to_batch=256, noise_scale=Estimate(512.0, 0.0, float("inf"), "by hand"))
    assert unbounded.endswith("[0, inf] the learning rate is 0.001 to 0.002")


def test_beyond_the_noise_scale():
    """E(B')/E(B) = (Bn + B')/(Bn + B)."""
    assert "times the noise scale" not in str(warnings(128, noise_scale=128))
    assert said("times the noise scale", noise_scale=64) == (
        "the batch is 2 times the noise scale 64: the loss of the old run takes about 1.5 times its examples, and this "
        "recipe keeps them"
    )
    assert said("no weight decay makes up", noise_scale=64)
    for without in ({"weight_decay": 0.0}, {"optimizer": "sgd", "betas": None, "eps": None}):
        assert "no weight decay makes up" not in str(warnings(noise_scale=64, changes=without))
    assert said("the first beta carries speed", noise_scale=64, betas="half_life")
    assert "carries speed" not in str(warnings(noise_scale=64))


def test_length():
    assert "updates are left" not in str(warnings(changes={"total_examples": 12_800}))
    assert said("only 99 updates are left", changes={"total_examples": 128 * 99})
    changes = {"total_examples": 100, "warmup_examples": 0}
    assert said("larger than the whole run", changes=changes) == (
        "the batch of 128 is larger than the whole run of 100 examples"
    )
    assert said("larger than the data set", changes={"train_examples": 100}).endswith("the data set of 100 examples")
    assert "larger than" not in str(warnings(changes={"train_examples": 128}))
    line = said("the warm-up of", changes={"warmup_examples": 10**7 // 2 + 64}, warmup="updates")
    assert line == "the warm-up of 10000128 examples is longer than the run of 10000000"
    lamb = {"optimizer": "lamb", "weight_decay": 0.0}
    assert said("LAMB's own recipe keeps the warm-up in updates", changes=lamb)
    assert "LAMB" not in str(warnings(changes=lamb, warmup="updates"))
    assert "LAMB" not in str(warnings(changes=lamb | {"warmup_examples": 0}))


def test_averages_without_memory():
    """β₂ = 0.9: 0.9^6.5 = 0.504 is not yet below a half, 0.9^6.6 = 0.499 is."""
    changes = {"betas": (0.9, 0.9)}
    assert "beta" not in str(warnings(416, changes=changes))
    assert said("beta 2 falls to 0.499", to_batch=422, changes=changes).endswith("over less than two updates")
    assert said("beta 1 falls to 0.498", to_batch=423, changes=changes, betas="half_life")
    rms = {"optimizer": "rmsprop", "alpha": 0.9, "betas": None, "weight_decay": 0.0}
    assert said("alpha falls to 0.498", to_batch=423, changes=rms)
    line = said("the weights' average", to_batch=1024, changes={"ema_decay": 0.9})
    assert line == (
        "the weights' average keeps 0.185 at an update, and has no memory left: its half-life of 421 examples is less "
        "than the 1024 between its updates"
    )
    assert "the weights' average" not in str(warnings(416, changes={"ema_decay": 0.9}))


def test_running_statistics_of_the_last_batch():
    """m = 0.1 on 32 times the devices: 1 - 0.9^32 = 0.966; a device's pass of 64 weighs (2 - m)/m = 1.07 times."""
    line = said("batchnorm_momentum", to_batch=2048, changes={"batchnorm_momentum": 0.1})
    assert line.startswith("batchnorm_momentum rises to 0.9657: the running statistics rest on about 68.6 examples of")
    assert "batchnorm" not in str(warnings(2048, changes={"batchnorm_momentum": 0.1, "micro_batch": 32}, devices=1))


def test_decay_without_a_rule():
    assert said("weight decay", changes={"optimizer": "adam"}) == (
        "adam's weight decay is an L2 penalty divided by √v: no rule says how it moves, it stays at 0.1 (adamw's has "
        "one)"
    )
    plain = {"betas": None, "eps": None}
    assert said("no rule says how lars's moves", changes=plain | {"optimizer": "lars"})
    assert said("no rule says how yogi's moves", changes=plain | {"optimizer": "yogi"})
    sgd = plain | {"optimizer": "sgd"}
    assert "penalty" not in str(warnings(changes=sgd, rule="linear"))
    line = said("the L2 penalty goes to 0.1414", changes=sgd, rule="sqrt")
    assert line.endswith("the loss that is minimised changes with it")


def test_decay_that_leaves_no_weights():
    """ηλ·κ: 0.24 times 2 is not yet above a half, 0.26 times 2 is."""
    assert "shrinks the weights" not in str(warnings(changes={"weight_decay": 240.0}))
    assert said("shrinks the weights", changes={"weight_decay": 260.0}) == (
        "an update shrinks the weights by 52 %: their timescale is less than two updates"
    )


def test_devices_and_passes():
    assert said("micro_batch 100 is larger than a device's share of 64", changes={"micro_batch": 100}).endswith("share")
    assert said("128 examples do not spread evenly over 3 devices", devices=3)
    line = said("examples per device rise from 64 to 95", to_batch=95)
    assert line.endswith("no whole number of devices keeps them")
    assert "per device" not in str(warnings(95, devices=1)) + str(warnings(96))
    assert "per device" not in str(warnings(128))


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_the_unit_is_named(unit):
    changes = {"unit": unit, "train_examples": 100}
    assert said("larger than the data set", changes=changes).endswith(f"of 100 {unit}")
