"""Every batch controller keeps the contract of `batchlab.testing.controllers`."""

import pytest

from batchlab.schedule.batches.batch_doubling import BatchDoubling
from batchlab.schedule.batches.batch_ramp import BatchRamp
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.decay_by_batch import DecayByBatch
from batchlab.schedule.batches.goodput_batch import GoodputBatch
from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.batches.stages import Stage, Stages
from batchlab.testing import controllers
from tests.spine.forked import in_ranks


class Plain(BatchController):
    """The base alone: every wish as it is."""

    needs = frozenset({"noise_scale"})

    def wanted(self, step, facts):
        return None if facts.noise_scale is None else facts.noise_scale.value


CASES = {
    "plain": lambda: Plain(64, maximum=4096, patience=2),
    "plain, at odds with everything": lambda: Plain(
        48, minimum=10, maximum=1008, multiple_of=24, growth=1.05, deadband=1.5, patience=3
    ),
    "noise scale": lambda: NoiseScaleBatch(64, exchange_rate=64.0, maximum=512, patience=5),
    "noise scale in eights": lambda: NoiseScaleBatch(
        64, exchange_rate=64.0, minimum=20, maximum=512, multiple_of=8, patience=3, growth=1.5
    ),
    "norm test": lambda: NormTestBatch(8, eta=0.5, maximum=4096),
    "norm test in fours": lambda: NormTestBatch(8, eta=0.5, maximum=4096, multiple_of=4, growth=2.0, patience=4),
    "norm test, coordinates": lambda: NormTestBatch(8, eta=0.5, maximum=4096, coordinate_wise=True),
    "inner product": lambda: InnerProductTestBatch(8, theta=0.5, maximum=4096),
    "augmented": lambda: InnerProductTestBatch(8, theta=0.5, nu=1.0, maximum=4096, growth=2.0),
    "goodput": lambda: GoodputBatch(64, maximum=512, patience=8),
    "goodput in eights": lambda: GoodputBatch(64, maximum=512, minimum=16, multiple_of=8, patience=6, growth=1.5),
    "decay by batch": lambda: DecayByBatch(
        64, share=lambda seen: max(0.0, 1 - seen / 4000), exponent=1.0, maximum=1024, multiple_of=4
    ),
    "ramp": lambda: BatchRamp(16, 256, over=5000, increment=16),
    "ramp, rounded": lambda: BatchRamp(16, 256, over=5000, increment=12, multiple_of=8, power=0.5),
    "doubling": lambda: BatchDoubling(8, [300, 1000, 2000], lr_rule="sqrt"),
    "milestones": lambda: Milestones(64, {500: 256, 2000: 32}, multiple_of=4),
    "stages": lambda: Stages([Stage(800, 2, batch_sequences=16), Stage(800, 8), Stage(100, 4)], multiple_of=4),
}


@pytest.mark.parametrize("check", controllers.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check):
    check(CASES[name])


def _all_in_a_rank():
    """One of each class: its limits are plain arithmetic on what all ranks agreed on."""
    for make in {type(make()): make for make in CASES.values()}.values():
        for check in controllers.RANKS:
            check(make)


def test_the_contract_of_ranks(tmp_path):
    assert in_ranks(2, tmp_path, _all_in_a_rank) == [0, 0]


class Broken(Plain):
    """Does what `how` says, each a way to break the contract."""

    def __init__(self, how):
        super().__init__(64, maximum=4096, patience=2)
        self.how, self.calls = how, 0

    def wanted(self, step, facts):
        wish = super().wanted(step, facts)
        self.calls += 1
        if self.how == "reads the loss":
            return wish if facts.loss is None else wish * facts.loss
        if self.how == "keeps a state unsaid":
            return 64 if self.calls % 40 > 20 else 512
        if self.how == "never moves":
            return 64
        if self.how == "guesses":
            return 100.0 if wish is None or not 0 < wish < 1e9 else wish
        return wish

    def _decided(self, wanted):
        if self.how == "leaps":
            return int(wanted)
        if self.how == "half sizes":
            return self.batch_size + 0.5
        return super()._decided(wanted)


@pytest.mark.parametrize(
    ("how", "caught_by"),
    [
        ("reads the loss", "other_facts_are_not_read"),
        ("keeps a state unsaid", "state_goes_round"),
        ("never moves", "it_moves"),
        ("guesses", "unknown_facts_change_nothing"),
        ("leaps", "sizes_keep_the_limits"),
        ("half sizes", "sizes_keep_the_limits"),
    ],
)
def test_the_contract_can_be_broken(how, caught_by):
    check = next(each for each in controllers.CHECKS if each.__name__ == caught_by)
    with pytest.raises(AssertionError):
        check(lambda: Broken(how))
