"""Recipes of every optimizer, over wide ranges."""

from hypothesis import strategies as st

from batchlab.planner import Recipe
from batchlab.planner.recipes.optimizers import traits
from batchlab.rules.learning_rate import FAMILY

SIZES = st.integers(1, 2**20)


def betas(least, count):
    """As many as the optimizer has, each in [least, 0.9999]; two where that is not known."""
    return st.tuples(*[st.floats(least, 0.9999)] * (count or 2))


def settings(optimizer, *, least_beta):
    """What the optimizer takes, each given or not."""
    forms = {
        "momentum": st.floats(0.0, 0.99),
        "betas": betas(least_beta, traits(optimizer).betas),
        "alpha": st.floats(least_beta, 0.9999),
        "eps": st.floats(1e-15, 1e-3),
        "weight_decay": st.floats(0.0, 1.0),
    }
    taken = {name: st.none() | form for name, form in forms.items() if name in traits(optimizer).takes}
    return st.fixed_dictionaries(taken)


@st.composite
def recipes(draw, batch_size=SIZES, devices=None, least_beta=0.5):
    """Any recipe, on one device unless `devices` says on how many."""
    size = draw(batch_size)
    optimizer = draw(st.sampled_from(sorted(FAMILY)))
    return Recipe(
        batch_size=size,
        optimizer=optimizer,
        learning_rate=draw(st.floats(1e-7, 10.0)),
        unit=draw(st.sampled_from(["examples", "tokens"])),
        devices=draw(devices(size)) if devices else 1,
        total_examples=draw(st.integers(1, 10**13)),
        warmup_examples=draw(st.integers(0, 10**10)),
        train_examples=draw(st.none() | st.integers(1, 10**12)),
        micro_batch=draw(st.none() | st.integers(1, 2**14)),
        ema_decay=draw(st.none() | st.floats(0.5, 0.9999)),
        ema_every=draw(st.integers(1, 100)),
        clip_norm=draw(st.none() | st.floats(1e-3, 1e3)),
        ghost_batch_size=draw(st.none() | st.integers(1, 2**10)),
        batchnorm_momentum=draw(st.none() | st.floats(0.0, 1.0)),
        noise_scale=draw(st.none() | st.floats(1e-2, 1e12) | st.just(float("inf"))),
        schedule=draw(st.text(min_size=1)),
        **draw(settings(optimizer, least_beta=least_beta)),
    )
