"""The schedules that the contract holds: a new one joins by one line."""

from functools import partial

from batchlab.schedule.rates.one_cycle import OneCycle
from batchlab.schedule.rates.power import Power
from batchlab.schedule.rates.progressive_weight_decay import ProgressiveWeightDecay
from batchlab.schedule.rates.regime_adaptation import RegimeAdaptation
from batchlab.schedule.rates.wsd import WSD

CASES = {
    "wsd": partial(WSD, batch=8, warmup=20, total=130, decay=60),
    "wsd_geometric": partial(WSD, batch=8, total=100, decay=90, shape="geometric", floor=0.1),
    "wsd_open": partial(WSD, batch=8, warmup=20),
    "power": partial(Power, batch=8, tokens_per_sequence=16, a=0.002, warmup=300),
    "power_with_an_end": partial(Power, batch=8, tokens_per_sequence=16, a=0.002, total=4000, decay=2000),
    "one_cycle": partial(OneCycle, batch=8, total=300),
    "one_cycle_log": partial(OneCycle, batch=8, total=300, shape="log", artefact=True, half=50),
    "one_cycle_without_momentum": partial(OneCycle, batch=8, total=300, momentum=None),
    "regime": partial(RegimeAdaptation, batch=8, examples=10, milestones=(1.5, 3), ref_batch=4),
    "regime_linear": partial(
        RegimeAdaptation, batch=8, examples=100, milestones=(1.2,), ref_batch=32, lr_rule="linear"
    ),
    "regime_epochs_kept": partial(RegimeAdaptation, batch=8, examples=40, milestones=(1,), keep_updates=False),
    "weight_decay": lambda optimizer, batch=8: ProgressiveWeightDecay(
        optimizer, [(20, 0.0), (35, 0.5), (40, 0.1)], batch=batch
    ),
}
