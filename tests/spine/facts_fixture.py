"""Facts made by hand for tests: a device with a fixed cost per update and per example, and a known trade-off."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from batchlab.core.facts import Estimate, Facts, LearningRateTrial, MicroBatchTime, NoisePoint, Reference
from batchlab.core.job import Job, Target

NOISE_SCALE = Estimate(64.0, 40.0, 100.0, "set by hand")


def exact(value, method="set by hand"):
    """An estimate without spread."""
    return Estimate(value, value, value, method)


def hand_job(*, optimizer="adamw", examples=4096, name="by hand", target=None):
    """A job that fits `hand_facts`; its model is one linear layer."""
    data = TensorDataset(torch.zeros(examples, 2), torch.zeros(examples))

    def loss(module, batch):
        x, y = batch
        return (module(x).squeeze(1) - y).square().mean()

    return Job(name, lambda: nn.Linear(2, 1), loss, data, data, optimizer=optimizer, target=target)


def hand_facts(
    *,
    noise_scale=NOISE_SCALE,
    s_min=100.0,
    base_batch_size=32,
    base_learning_rate=1e-3,
    pass_seconds=0.0,
    example_seconds=1e-3,
    update_seconds=4e-3,
    micro_batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    reached=True,
    optimizer="adamw",
    examples=4096,
    true_b_crit=None,
    **changes,
):
    """Facts of a device whose pass takes pass_seconds + examples·example_seconds, and an update update_seconds more.

    The reference run takes S_min·(1 + B_crit/B₀) updates; B_crit is `true_b_crit`, by default the noise scale's value,
    or 64 where that is undefined.
    """
    b_crit = true_b_crit or (noise_scale.value if noise_scale.defined else 64.0)
    steps = round(s_min * (1 + b_crit / base_batch_size))
    settings = {
        "job": "by hand",
        "unit": "example",
        "units_per_example": 1,
        "train_examples": examples,
        "optimizer": optimizer,
        "device": "cpu",
        "machine": {"cores": 1},
        "noise_scale": noise_scale,
        "noise": (NoisePoint(steps, steps * base_batch_size, noise_scale),),
        "micro_batches": tuple(MicroBatchTime(b, exact(pass_seconds + example_seconds * b)) for b in micro_batches),
        "max_micro_batch": micro_batches[-1],
        "update_seconds": exact(update_seconds),
        "base_batch_size": base_batch_size,
        "base_learning_rate": base_learning_rate,
        "learning_rate_trials": (LearningRateTrial(base_learning_rate, 0.5),),
        "reference": Reference(
            base_batch_size,
            base_learning_rate,
            steps=steps,
            seconds=1.0,
            steps_to_target=steps if reached else None,
            evaluations=tuple((step, 1.0 / step) for step in (steps // 2, max(1, steps - 10), steps)),
        ),
        "target": Target("loss", 0.5),
        "target_origin": "reference run",
    }
    return Facts(**(settings | changes))
