"""A recipe moved: what every optimizer and rule keeps, and the numbers of each rule."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from batchlab import planner, rules
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.planner import Recipe, Rescaled
from batchlab.planner.recipes.optimizers import traits
from batchlab.rules.learning_rate import OF_NOISE
from tests.planner.recipes.strategies import SIZES, recipes

RULES = [None, "none", "linear", "sqrt", "saturating", "saturating_sqrt", "surge", "power"]
FLOATS = ("learning_rate", "momentum", "betas", "alpha", "eps", "weight_decay", "ema_decay", "clip_norm")
FLOATS += ("batchnorm_momentum", "noise_scale")


def move(recipe, to_batch, rule=None, **options):
    """With a noise scale where the rule needs one, and an exponent where it needs that."""
    if rule in OF_NOISE and recipe.noise_scale is None:
        options["noise_scale"] = 1234.5
    if rule == "power":
        options["exponent"] = 0.75
    return planner.recipe(recipe, to_batch, rule=rule, **options).recipe


def same(twice, once, between):
    """All fields; where a share has run into 0 or 1 on the way, its digits are lost and it is not compared."""
    for field in dataclasses.fields(Recipe):
        found, wanted, mid = (getattr(each, field.name) for each in (twice, once, between))
        if found is None or field.name not in FLOATS:
            assert found == wanted, field.name
        elif field.name in ("betas", "alpha", "ema_decay"):
            kept = [m > 1e-200 for m in np.atleast_1d(mid)]
            assert np.atleast_1d(found)[kept] == pytest.approx(np.atleast_1d(wanted)[kept], rel=1e-9, abs=1e-200)
        elif field.name != "batchnorm_momentum" or 1 - mid > 1e-6:
            assert found == pytest.approx(wanted, rel=1e-9), field.name


@pytest.mark.parametrize("rule", RULES)
@given(recipe=recipes(), b=SIZES, c=SIZES, devices=st.integers(1, 64), how=st.sampled_from(["second", "half_life"]))
def test_moving_twice_is_moving_once(rule, recipe, b, c, devices, how):
    assume(devices <= min(b, c))
    options = {"devices": devices, "betas": how, "rule": rule}
    between = move(recipe, b, **options)
    same(move(between, c, **options), move(recipe, c, **options), between)


@given(recipe=recipes(), b=SIZES, c=SIZES, ema_every=st.integers(1, 50))
def test_betas_that_are_kept_and_an_average_of_another_cadence(recipe, b, c, ema_every):
    options = {"devices": 1, "betas": "keep", "ema_every": None if recipe.ema_decay is None else ema_every}
    between = move(recipe, b, **options)
    same(move(between, c, **options), move(recipe, c, **options), between)
    assert (between.betas, between.alpha, between.eps) == (recipe.betas, recipe.alpha, recipe.eps)


@given(recipe=recipes(batch_size=st.integers(64, 4096), least_beta=0.99), b=SIZES, c=SIZES)
def test_betas_to_first_order(recipe, b, c):
    b, c = (recipe.batch_size // 16 + size % recipe.batch_size for size in (b, c))  # κ up to 17/16, so κ(1 - β) < 1
    options = {"devices": 1, "betas": "sde"}
    between = move(recipe, b, **options)
    same(move(between, c, **options), move(recipe, c, **options), between)


@given(recipe=recipes(batch_size=st.just(1)), share=st.integers(1, 999), counts=st.tuples(*[st.integers(1, 64)] * 3))
def test_devices_keep_their_share(recipe, share, counts):
    """Without devices given: a -> b -> c is a -> c in devices too, where whole numbers of them do it."""
    a, b, c = counts
    start = dataclasses.replace(recipe, batch_size=a * share, devices=a)
    between = planner.recipe(start, b * share).recipe
    twice, once = planner.recipe(between, c * share).recipe, planner.recipe(start, c * share).recipe
    assert (between.devices, twice.devices) == (b, c)
    same(twice, once, between)


@pytest.mark.parametrize("rule", RULES)
@given(
    recipe=recipes(devices=lambda size: st.integers(1, size)),
    how=st.sampled_from(["second", "half_life", "sde", "keep"]),
    warmup=st.sampled_from(["examples", "updates"]),
)
def test_to_its_own_batch_is_the_identity_bit_for_bit(rule, recipe, how, warmup):
    options = {"rule": rule, "betas": how, "warmup": warmup}
    if rule in OF_NOISE:
        recipe = dataclasses.replace(recipe, noise_scale=recipe.noise_scale or 77.7)
    assert move(recipe, recipe.batch_size, **options) == recipe
    assert move(recipe, recipe.batch_size, devices=recipe.devices, **options).to_toml() == recipe.to_toml()


@given(recipe=recipes(devices=lambda size: st.integers(1, size)), to_batch=SIZES)
def test_what_an_example_does_is_kept(recipe, to_batch):
    moved = planner.recipe(recipe, to_batch).recipe
    kappa = to_batch / recipe.batch_size
    for name in ("total_examples", "warmup_examples", "train_examples", "schedule", "micro_batch", "momentum"):
        assert getattr(moved, name) == getattr(recipe, name), name
    assert (moved.steps - 1) * to_batch < moved.total_examples <= moved.steps * to_batch
    if recipe.ema_decay is not None and moved.ema_decay > 1e-200:
        assert moved.ema_half_life == pytest.approx(recipe.ema_half_life, rel=1e-6)
    if traits(recipe.optimizer).decay in ("decoupled", "l2") and recipe.weight_decay:
        timescale = recipe.batch_size / (recipe.learning_rate * recipe.weight_decay)
        assert to_batch / (moved.learning_rate * moved.weight_decay) == pytest.approx(timescale, rel=1e-9)
    else:
        assert moved.weight_decay == recipe.weight_decay
    if recipe.noise_scale is not None and recipe.clip_norm is not None:
        ratio = rules.gradient_norm.norm_ratio(1, kappa, noise_scale=recipe.noise_scale / recipe.batch_size)
        assert moved.clip_norm == pytest.approx(recipe.clip_norm * ratio, rel=1e-9)


@given(recipe=recipes(devices=lambda size: st.integers(1, size)), to_batch=SIZES)
def test_every_number_has_its_reason_and_texts_go_round(recipe, to_batch):
    moved = planner.recipe(recipe, to_batch)
    numbers = {"batch_size", "devices", "total_examples", "warmup_examples", "schedule", "steps", "accumulation"}
    numbers |= {f.name for f in dataclasses.fields(Recipe) if getattr(recipe, f.name) is not None}
    numbers -= {"optimizer", "unit", "train_examples"} | ({"ema_every"} if recipe.ema_decay is None else set())
    assert numbers <= set(moved.reasons)
    for name, reason in moved.reasons.items():
        value = getattr(moved.recipe, name)
        assert reason.value == (list(value) if isinstance(value, tuple) else value), name
        assert reason.rule and reason.source
    assert Recipe.from_toml(moved.to_toml()) == moved.recipe
    assert Rescaled.from_json(moved.to_json()).recipe == moved.recipe
    assert len(moved.table().split("\n")) == 2 + len(moved.reasons) + len(moved.warnings)


ADAMW = Recipe(
    256, 115_305_030, "adamw", 1e-3, weight_decay=0.1, ema_decay=0.9999, clip_norm=1.0, batchnorm_momentum=0.1
)


def test_goyal_et_al():
    """0.1 at 256 is 3.2 at 8192, warm-up of five epochs and decay unchanged (arXiv 1706.02677), by its rule."""
    data = {"train_examples": 1_281_167, "epochs": 90, "warmup_epochs": 5, "momentum": 0.9, "weight_decay": 1e-4}
    base = Recipe.of(batch_size=256, optimizer="sgd", learning_rate=0.1, **data)
    moved = planner.recipe(base, 8192, devices=64, rule="linear").recipe
    assert (moved.learning_rate, moved.weight_decay, moved.momentum) == (pytest.approx(3.2), 1e-4, 0.9)
    assert (moved.devices, moved.share, moved.epochs, moved.warmup_examples) == (64, 128, 90, 5 * 1_281_167)
    assert (base.steps, moved.steps) == (450_411, 14_076)


def test_grendel():
    """Sheet 36, check 1: four lines at once, and moving there again changes nothing."""
    base = Recipe(1, 30_000, "adam", 1e-3, betas=(0.9, 0.999), eps=1e-15)
    moved = planner.recipe(base, 16, betas="half_life").recipe
    assert (moved.learning_rate, moved.eps) == (pytest.approx(4e-3, rel=1e-12), pytest.approx(2.5e-16, rel=1e-12))
    assert [round(beta, 5) for beta in moved.betas] == [0.18530, 0.98412]
    assert planner.recipe(moved, 16, betas="half_life").recipe == moved


def test_busbridge_et_al():
    """Sheet 53: √κ for η and λ, first-order betas, ρ^κ; the same as `rules.ema.with_optimizer`."""
    base = dataclasses.replace(ADAMW, betas=(0.99, 0.999))
    moved = planner.recipe(base, 2048, betas="sde").recipe
    settings = rules.ema.Averaged(1e-3, 0.9999, 0.1, (0.99, 0.999), 1e-8)
    wanted = rules.ema.with_optimizer(settings, 8, optimizer="adamw")
    found = (moved.learning_rate, moved.ema_decay, moved.weight_decay, moved.betas, moved.eps)
    assert found == tuple(pytest.approx(value, rel=1e-12) for value in wanted)
    with pytest.raises(InputError, match=r"kappa\*\(1 - beta\) must be at most 1, got 128.0\*\(1 - 0.99\)"):
        planner.recipe(base, 2**15, betas="sde")


def test_bergsma_et_al():
    """Sheet 17: with the learning rate fixed, λ goes as the batch."""
    assert planner.recipe(ADAMW, 1024, rule="none").recipe.weight_decay == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("k", range(7))
def test_lamb(k):
    """Sheet 21: 5/(2^3·1000) and 1/320 of the run at 512; 0.005 and 1/5 at 32768; equal steps between."""
    base = Recipe.of(batch_size=512, optimizer="lamb", learning_rate=6.25e-4, steps=10**6, warmup_share=1 / 320)
    moved = planner.recipe(base, 512 * 2**k, warmup="updates").recipe
    assert moved.learning_rate == pytest.approx(5 / (2 ** (3 - k / 2) * 1000), rel=1e-12)
    assert moved.warmup_examples / moved.total_examples == pytest.approx(2**k / 320, rel=1e-12)
    assert moved.warmup_steps == base.warmup_steps == 3125
    assert moved.steps == 10**6 // 2**k


@pytest.mark.parametrize(
    ("optimizer", "settings", "moved"),
    [
        ("adam", {"weight_decay": 0.1}, {"weight_decay": 0.1, "betas": (0.9, 0.999**4), "eps": 5e-9}),
        ("rmsprop", {}, {"alpha": 0.99**4, "eps": 5e-9, "momentum": 0.0}),
        ("adagrad", {}, {"learning_rate": 0.01, "eps": 1e-10}),
        ("lion", {"betas": (0.9, 0.99), "weight_decay": 0.1}, {"betas": (0.9, 0.99), "weight_decay": 0.2}),
        ("came", {"betas": (0.9, 0.999, 0.9999)}, {"betas": (0.9, 0.999**4, 0.9999**4)}),
        ("adan", {"betas": (0.98, 0.92, 0.99)}, {"betas": (0.98, 0.92, 0.99**4)}),
        ("sophia", {"betas": (0.965, 0.99), "eps": 1e-12}, {"betas": (0.965, 0.99**4), "eps": 1e-12}),
        ("muon", {}, {"momentum": 0.95, "weight_decay": 0.2}),
        ("lars", {"weight_decay": 5e-4, "momentum": 0.9}, {"weight_decay": 5e-4, "momentum": 0.9}),
        ("lamb", {"betas": (0.9, 0.999), "eps": 1e-6}, {"betas": (0.9, 0.999**4), "eps": 5e-7, "weight_decay": None}),
        ("sgdw", {"weight_decay": 1e-4}, {"learning_rate": 0.02, "weight_decay": 2e-4}),
    ],
)
def test_what_moves_of_each_optimizer(optimizer, settings, moved):
    """Four times the batch, no noise scale."""
    found = planner.recipe(Recipe(64, 10**6, optimizer, 0.01, **settings), 256).recipe
    for name, value in moved.items():
        assert getattr(found, name) == (value if value is None else pytest.approx(value, rel=1e-12)), name


def test_eps_and_clipping_follow_the_gradient_near_the_noise_scale():
    moved = planner.recipe(ADAMW, 8192, noise_scale=1024).recipe
    ratio = math.sqrt((1 + 1024 / 8192) / (1 + 1024 / 256))
    assert moved.clip_norm == pytest.approx(ratio) and moved.eps == pytest.approx(1e-8 * ratio)
    far = planner.recipe(ADAMW, 8192, noise_scale=math.inf).recipe
    assert far.clip_norm == pytest.approx(32**-0.5) and far.eps == pytest.approx(1e-8 * 32**-0.5)
    unknown = planner.recipe(ADAMW, 8192).recipe
    assert unknown.clip_norm == 1.0 and unknown.eps == pytest.approx(1e-8 * 32**-0.5)


@pytest.mark.parametrize(
    ("layout", "devices", "exponent"),
    [
        ({}, 1, 32),
        ({}, 32, 32),
        ({"micro_batch": 64}, 1, 1),
        ({"micro_batch": 64}, 32, 32),
        ({"ghost_batch_size": 32}, 1, 1),
        ({"ghost_batch_size": 32}, 32, 32),
        ({"ghost_batch_size": 32, "micro_batch": 128}, 4, 4),
    ],
)
def test_batchnorms_momentum_goes_by_examples_between_updates_of_its_statistics(layout, devices, exponent):
    moved = planner.recipe(dataclasses.replace(ADAMW, **layout), 8192, devices=devices).recipe
    assert moved.batchnorm_momentum == pytest.approx(1 - 0.9**exponent, rel=1e-12)
    assert moved.ghost_batch_size == layout.get("ghost_batch_size")


def test_the_average_takes_another_cadence():
    """ρ to the κ·k'/k: half-life in examples kept."""
    moved = planner.recipe(ADAMW, 1024, ema_every=10).recipe
    assert (moved.ema_every, moved.ema_decay) == (10, pytest.approx(0.9999**40, rel=1e-12))
    assert moved.ema_half_life == pytest.approx(ADAMW.ema_half_life, rel=1e-9)


def test_rates_are_told_side_by_side():
    moved = planner.recipe(ADAMW, 1024, noise_scale=512)
    law = rules.learning_rate
    assert moved.learning_rates == {
        "linear": pytest.approx(4e-3),
        "sqrt": pytest.approx(2e-3),
        "saturating": law.saturating(1e-3, 256, 1024, noise_scale=512),
        "saturating_sqrt": law.saturating_sqrt(1e-3, 256, 1024, noise_scale=512),
        "surge": law.surge(1e-3, 256, 1024, noise_scale=512),
    }
    assert moved.recipe.learning_rate == moved.learning_rates["saturating_sqrt"]
    assert list(planner.recipe(ADAMW, 1024).learning_rates) == ["linear", "sqrt"]
    assert planner.recipe(ADAMW, 1024, rule="power", exponent=0.25).learning_rates["power"] == pytest.approx(
        2**0.5 / 1e3
    )


def test_an_estimate_of_the_noise_scale():
    estimate = Estimate(512.0, 300.0, 900.0, "by hand")
    moved = planner.recipe(ADAMW, 1024, noise_scale=estimate)
    assert moved.recipe == planner.recipe(ADAMW, 1024, noise_scale=512).recipe and moved.recipe.noise_scale == 512
    unknown = planner.recipe(ADAMW, 1024, noise_scale=Estimate(math.nan, 0.0, math.inf, "no signal"))
    assert unknown.recipe == planner.recipe(ADAMW, 1024).recipe and unknown.recipe.noise_scale is None


def test_the_table():
    title, *lines = planner.recipe(Recipe(256, 2560, "sgd", 0.1), 512, devices=2).table().split("\n")
    assert title == "sgd, from a batch of 256 to 512 examples, κ = 2"
    assert lines[0].split() == ["old", "new", "rule"]
    assert [line.split()[:3] for line in lines[1:3]] == [["batch_size", "256", "512"], ["devices", "1", "2"]]
    assert any(line.split()[:4] == ["learning_rate", "0.1", "0.141421", "sqrt:"] for line in lines)
    assert {line.index("kept") for line in lines if "  kept" in line} == {lines[0].index("rule")}
    assert "total_tokens" in planner.recipe(Recipe(256, 2560, "sgd", 0.1, unit="tokens"), 512).table()


def test_a_file_moved(tmp_path):
    (tmp_path / "recipe.toml").write_text(ADAMW.to_toml())
    text = planner.rescaled_toml(tmp_path / "recipe.toml", 8192, devices=64)
    assert Recipe.from_toml(text) == planner.recipe(ADAMW, 8192, devices=64).recipe
    moved, counts, first = text.split("\n")[:3]
    assert moved == "# moved from a batch of 256 to 8192 examples, κ = 32"
    assert counts == "# updates: 14076, in the warm-up: 0, passes of a device for each: 1"
    assert first.startswith("# the learning-rate rules lie")
    assert "devices = 64  # was 1; given by the user [user]\n" in text
    assert "total_examples = 115305030  # kept, in examples [" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to_batch": 0}, "to_batch must be an integer of at least 1, got 0"),
        ({"to_batch": 2**63}, r"to_batch must be below 2\^63, got 9223372036854775808"),
        ({"to_batch": 1e3}, "to_batch must be an integer of at least 1, got 1000.0"),
        ({"devices": 2000}, "devices must be at most to_batch = 1024, as every device needs .*got 2000"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
        ({"rule": "cubic"}, r"rule must be one of \['linear', 'none', .*got 'cubic'"),
        ({"rule": "surge"}, "the rule 'surge' needs noise_scale, got None"),
        ({"rule": "power"}, "the rule 'power' needs its exponent"),
        ({"exponent": 0.5}, 'exponent is for rule="power" alone, got 0.5 with rule=None'),
        ({"noise_scale": 0}, "noise_scale must be > 0, got 0"),
        ({"noise_scale": math.nan}, "noise_scale must be > 0, got nan"),
        ({"noise_scale": "64"}, "noise_scale must be > 0, got '64'"),
        ({"betas": "both"}, "betas must be one of 'second', 'half_life', 'sde', 'keep', got 'both'"),
        ({"warmup": "steps"}, "warmup must be one of 'examples', 'updates', got 'steps'"),
        ({"ema_every": 0}, "ema_every must be an integer of at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(InputError, match=message):
        planner.recipe(ADAMW, **({"to_batch": 1024} | options))


def test_what_is_no_recipe_is_named():
    with pytest.raises(InputError, match="recipe must be a planner.Recipe, got dict"):
        planner.recipe({"batch_size": 1}, 2)
    with pytest.raises(InputError, match="ema_every must be None for a recipe without ema_decay, got 4"):
        planner.recipe(Recipe(8, 80, "sgd", 0.1), 16, ema_every=4)


def test_numpys_numbers_are_numbers():
    moved = planner.recipe(ADAMW, np.int64(1024), devices=np.int32(4), noise_scale=np.float64(500))
    assert moved.recipe == planner.recipe(ADAMW, 1024, devices=4, noise_scale=500.0).recipe
    assert Rescaled.from_json(moved.to_json()).recipe == moved.recipe


def test_an_unbounded_noise_scale_goes_round():
    moved = planner.recipe(Recipe(256, 10**6, "adamw", 1e-3, noise_scale=math.inf, clip_norm=1.0), 1024)
    assert moved.reasons["noise_scale"].value == math.inf
    assert Rescaled.from_json(moved.to_json()) == moved


@pytest.mark.parametrize(
    ("devices", "to_batch", "found"),
    [(8, 1000, 25), (8, 1009, 32), (8, 8192, 256), (3, 512, 6), (8, 100, 4), (1, 100, 1), (8, 300, 10)],
)
def test_devices_divide_the_batch_where_a_number_near_does(devices, to_batch, found):
    """8·1000/256 = 31.25: 25 divides 1000. 1009 is prime, and 3·512/256 is whole."""
    moved = planner.recipe(Recipe(256, 10**6, "sgd", 0.1, devices=devices), to_batch)
    assert moved.recipe.devices == found
    uneven = [line for line in moved.warnings if "do not spread evenly" in line]
    assert bool(uneven) == (to_batch % found != 0)
    assert ("divides the batch" in moved.reasons["devices"].rule) == (to_batch in (1000, 100, 300))


def test_devices_of_a_huge_batch_are_found_in_no_time():
    moved = planner.recipe(Recipe(3, 2**60, "sgd", 0.1, devices=2), 2**61 - 1)  # a prime
    assert moved.recipe.devices == (2 * (2**61 - 1) + 1) // 3
