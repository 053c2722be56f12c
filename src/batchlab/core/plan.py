"""`Plan`: what to run. Frozen, JSON both ways, and every number carries its `Reason`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.jsonio import JsonNoun, settle_fields

SCHEMA = 1
OURS, USER, GIVEN = "batchlab", "user", "given by the user"
_NO_NUMBERS = ("job", "goal", "optimizer", "target", "hyperparameters", "reasons", "frontier", "notes", "schema")
_MAY_LACK_A_REASON = ("measure_noise", "learning_rate_rule")  # chosen by plans of old, with none
BatchSchedule = Literal[
    "fixed", "adaptive", "goodput", "decay_by_batch", "norm_test", "inner_product_test", "ramp", "milestones"
]


@dataclass(frozen=True)
class Reason(JsonNoun):
    """Why a number is what it is. rule: the rule's name or formula. source: paper, sheet or "user".

    inputs: the facts it used, by name. value: the number itself. Sequences in them come back from JSON as lists.
    """

    rule: str
    source: str
    inputs: Mapping[str, Any]
    value: Any


@dataclass(frozen=True)
class FrontierRow(JsonNoun):
    """One choice: what a batch size on so many devices is predicted to take to the target.

    steps: updates to the target. time: seconds. cost: device-seconds. picked: the plan's own choice. dollars, joules:
    of all devices, where a price and a power were given.
    """

    batch_size: int
    devices: int
    steps: float
    time: float
    cost: float
    picked: bool = False
    dollars: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Plan(JsonNoun):
    """What to run. Counts of examples are global, over all devices; schedules are counted in examples.

    Numbers of any library are taken, and kept as Python's own; sequences in the settings are kept as lists.
    goal: what was planned for; "probe" of a probe's own short runs.
    reasons: by the numbers' names, hyperparameters' too. In a plan that has reasons, a number that is not its reason's
        (`dataclasses.replace`, an edited file) says that it was given; `because` gives it another reason.

    batch_size: examples an update, over all devices. micro_batch: the most examples of one forward and backward pass.
    accumulation: such passes on one device for one update, alike in size to one example.
    steps: the most updates to run at `batch_size`; where the batch moves, the run ends after as many examples.
    predicted_steps: updates to the target, with its interval.
    learning_rate: the peak. hyperparameters: the optimizer's others, by torch's names.
    warmup_examples: linear warm-up of the learning rate. schedule: what follows it, over `steps * batch_size`.
        schedule_settings: of "wsd", "power" and "one_cycle", where they are not `schedule.by_examples.SETTINGS`.
    batch_schedule: "fixed"; "adaptive", which follows the measured noise scale; "goodput", which also times the
        updates; "decay_by_batch", which grows the batch where the schedule would lower the rate; "norm_test" and
        "inner_product_test", which grow it to what the gradients' spread asks for; "ramp" and "milestones", of sizes
        settled beforehand. All stay between `min_batch_size` and `max_batch_size`.
        batch_settings: what the controller of that name in `schedule` takes besides; "ramp" needs {"end", "over"},
        "milestones" {"sizes": [[examples, size], ...]}.
    learning_rate_rule: how the learning rate moves with the batch then: "none", "sqrt", "linear", or "surge",
        "saturating" or "saturating_sqrt", evaluated at `noise_scale`.
    ema_half_life: half-life of the weights' moving average in examples, evaluated in place of the weights.
    average_power: in its place, the power p of an average that weighs the weights by (examples seen)^p: about the
        last 1/(p + 1) of the run, at any batch size and length (Shamir and Zhang 2013). Both None for no average.
    evaluation_batch: examples of one forward pass in evaluation; the micro-batch if None.
    measure_noise: whether the noise scale is measured along the run, which takes two pieces an update. noise_every:
        at one update in so many. Where the batch follows the noise it is measured whatever `measure_noise` says.
    evaluate_every, checkpoint_every: in updates. clip_norm: gradient norm limit, or None.
    precision: "float32", or "bf16" autocast. compile: whether the model goes through `torch.compile`.
    """

    job: str
    goal: Literal["time", "cost", "balanced", "probe"]
    batch_size: int
    micro_batch: int
    accumulation: int
    world_size: int
    steps: int
    optimizer: str
    learning_rate: float
    hyperparameters: Mapping[str, int | float | bool | str | tuple[float, ...] | None] = field(default_factory=dict)
    predicted_steps: Estimate | None = None
    predicted_step_seconds: float | None = None
    noise_scale: Estimate | None = None
    warmup_examples: int = 0
    schedule: Literal["constant", "linear", "cosine", "wsd", "power", "one_cycle"] = "constant"
    schedule_settings: Mapping[str, Any] = field(default_factory=dict)
    batch_schedule: BatchSchedule = "fixed"
    batch_settings: Mapping[str, Any] = field(default_factory=dict)
    min_batch_size: int = 1
    max_batch_size: int | None = None
    learning_rate_rule: Literal["none", "sqrt", "linear", "surge", "saturating", "saturating_sqrt"] = "none"
    ema_half_life: float | None = None
    average_power: float | None = None
    clip_norm: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    evaluation_batch: int | None = None
    measure_noise: bool = True
    noise_every: int = 1
    evaluate_every: int = 10
    checkpoint_every: int = 100
    target: Target | None = None
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    frontier: tuple[FrontierRow, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema > SCHEMA:
            raise InputError(
                f"a plan of schema {self.schema} comes from a newer batchlab; this one reads up to {SCHEMA}"
            )
        for name in (
            "batch_size",
            "micro_batch",
            "accumulation",
            "world_size",
            "steps",
            "noise_every",
            "evaluate_every",
            "checkpoint_every",
            "min_batch_size",
            "max_batch_size",
            "evaluation_batch",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_batch_size", "evaluation_batch"):
                continue
            if not is_count(value):
                raise InputError(f"plan {name} must be an integer of at least 1, got {value!r}")
        settle_fields(self, "plan")
        if self.batch_size < self.world_size:
            raise InputError(
                f"plan batch_size {self.batch_size} is smaller than world_size {self.world_size}: "
                "every device needs an example"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"plan learning_rate must be finite and > 0, got {self.learning_rate!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"plan clip_norm must be > 0, got {self.clip_norm!r}")
        if self.ema_half_life is not None and not 0 < self.ema_half_life < float("inf"):
            raise InputError(f"plan ema_half_life must be finite and > 0 examples, got {self.ema_half_life!r}")
        if self.average_power is not None and not 0 <= self.average_power < float("inf"):
            raise InputError(f"plan average_power must be finite and >= 0, got {self.average_power!r}")
        if self.ema_half_life is not None and self.average_power is not None:
            raise InputError("plan ema_half_life and average_power are two averages: give one of them")
        if self.predicted_step_seconds is not None and not 0 < self.predicted_step_seconds < float("inf"):
            raise InputError(f"plan predicted_step_seconds must be finite and > 0, got {self.predicted_step_seconds!r}")
        if self.warmup_examples < 0:
            raise InputError(f"plan warmup_examples must not be negative, got {self.warmup_examples!r}")

        object.__setattr__(self, "reasons", self._reasons_kept() | self._reasons_given())

    @property
    def examples(self) -> int:
        """Of the whole run, which ends when as many were seen, in whatever batches."""
        return self.steps * self.batch_size

    @property
    def prediction(self) -> Estimate | None:
        """`predicted_steps`, where they are this run's: they are those of a batch that stays, as it was planned."""
        return self.predicted_steps if self.batch_schedule == "fixed" and not self.predicted_for else None

    @property
    def predicted_for(self) -> dict[str, Any]:
        """What `predicted_steps` were predicted for and is another by now: the planned values, by name."""
        reason = self.reasons.get("predicted_steps")
        planned = reason.inputs if reason else {}
        now = self._predicting()
        other = {name: planned[name] for name in now if name in planned and not _same(planned[name], now[name])}
        if "learning_rate" in other and math.isclose(other["learning_rate"], self.learning_rate, rel_tol=5e-4):
            del other["learning_rate"]  # typed as it is shown
        return other

    def _predicting(self) -> dict[str, Any]:
        """What a prediction is for: its reason has these among its inputs."""
        numbers = {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        return numbers | {"optimizer": self.optimizer, "target": str(self.target)}

    def because(self, rule: str, source: str, **numbers: Any) -> Plan:
        """With other numbers, for a reason that is not the user's."""
        planned = {name: value for name, value in self._numbers().items() if name in numbers}
        changed = dataclasses.replace(self, reasons={}, **numbers)
        found = {
            name: Reason(rule, source, {"in_place_of": planned[name]}, value)
            for name, value in changed._numbers().items()
            if name in numbers and not _same(value, planned[name])
        }
        return dataclasses.replace(changed, reasons=dict(self.reasons) | found if self.reasons else {})

    def explain(self) -> list[tuple[str, str, str, str]]:
        """Rows (name, value, rule with its inputs, source) of every number that has a reason.

        Where an input is a number of the plan's, and is another by now, its value now stands beside it.
        """
        numbers = self._numbers() | {"goal": self.goal} | self._predicting()
        return [
            (name, _short(reason.value), "; ".join([reason.rule, *_used(reason.inputs, numbers)]), reason.source)
            for name, reason in self.reasons.items()
        ]

    def _numbers(self) -> dict[str, Any]:
        """What may have a reason, by name, as a reason holds it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NO_NUMBERS}
        return {name: _plain(value) for name, value in (fields | dict(self.hyperparameters)).items()}

    def _reasons_kept(self) -> dict[str, Reason]:
        """Each reason, but where it is another number's."""
        numbers = self._numbers()
        return {
            name: reason
            if _same(reason.value, value := numbers.get(name, reason.value))
            else Reason(GIVEN, USER, {"in_place_of": _first(reason)}, value)
            for name, reason in self.reasons.items()
        }

    def _reasons_given(self) -> dict[str, Reason]:
        """Of what is not as it is where nothing is said, in a plan that has reasons."""
        if not self.reasons:
            return {}
        usual = {f.name: _plain(_default(f)) for f in dataclasses.fields(self) if f.name not in _NO_NUMBERS}
        return {
            name: Reason(GIVEN, USER, {}, value)
            for name, value in self._numbers().items()
            if name not in self.reasons
            and name not in _MAY_LACK_A_REASON
            and not _same(value, usual.get(name, dataclasses.MISSING))
        }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Estimate) else list(value) if isinstance(value, tuple) else value


def _first(reason: Reason) -> Any:
    """What was there before anything was given."""
    return reason.inputs.get("in_place_of", reason.value) if reason.source == USER else reason.value


def _used(inputs: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    """The inputs in one text, those that are other numbers by now with these; none where there are none."""
    said = []
    for name, value in inputs.items():
        now = numbers.get(name, value)
        said.append(f"{name} = {_short(value)}" + ("" if _same(value, now) else f" (now {_short(now)})"))
    return [", ".join(said)] if said else []


def _same(one: Any, other: Any) -> bool:
    """Whether they are equal; NaN is NaN."""
    return bool(one == other) or (one != one and other != other)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
