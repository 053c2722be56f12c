"""What an hour of a device costs, where that is from, and tokens for the money."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.hardware import Device, hardware

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Price(JsonNoun):
    """USD for an hour of one device. origin: "given" by the caller, or "table", dated `as_of` and of `source`."""

    per_hour: float
    origin: str
    as_of: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.per_hour:g} USD/h, " + (
            f"{self.source}, {self.as_of}" if self.origin == "table" else self.origin
        )


def find_device(device: Device | str) -> Device:
    """The device itself, or the one of that name in `hardware()`."""
    if isinstance(device, Device):
        return device
    known = hardware()
    if not isinstance(device, str) or device not in known:
        raise InputError(f"device must be a Device or one of {sorted(known)}, got {device!r}")
    return known[device]


def price_of(device: Device, per_hour: float | None) -> Price | None:
    """The price that was given, else the dated one of the device's table, else None. Prices age: say its date."""
    if per_hour is not None:
        check_positive(price_per_hour=per_hour)
        return Price(float(per_hour), "given")
    if device.price_per_hour is None:
        return None
    return Price(device.price_per_hour, "table", device.price_as_of, device.price_source)


def tokens_per_dollar(tokens_per_second: float, *, price_per_hour: float, devices: int = 1) -> float:
    """3600·(tokens/s)/(price·devices). tokens_per_second: of all devices. price_per_hour: USD for one of them.

    >>> tokens_per_dollar(1e5, price_per_hour=2.0, devices=8) / 1e6
    22.5
    """
    check_positive(tokens_per_second=tokens_per_second, price_per_hour=price_per_hour)
    check_count(devices=devices)
    return tokens_per_second * SECONDS_PER_HOUR / (price_per_hour * devices)
