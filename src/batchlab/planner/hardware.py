"""What accelerators can do and how they are joined: published, dated figures, and a user's own in the same form."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchlab.core.checks import check_count, check_not_negative, check_positive, holds, is_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

UNITS: dict[str, dict[str, float]] = {
    "memory": {"GiB": 2**30, "GB": 1e9, "MiB": 2**20, "MB": 1e6},
    "peak": {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "PFLOP/s": 1e15},
    "memory_bandwidth": {"GB/s": 1e9, "TB/s": 1e12, "GiB/s": 2**30},
    "link_bandwidth": {"GB/s": 1e9, "TB/s": 1e12, "GiB/s": 2**30, "Gbit/s": 1e9 / 8},
    "power": {"W": 1.0, "kW": 1e3},
}
DEVICE_KEYS = (*UNITS, "devices_per_node", "source", "as_of")
OPTIONAL_KEYS = ("peak_format",)
PEAK_FORMATS = ("bfloat16", "float16")
PRICE_KEYS = ("usd_per_hour", "source", "as_of")


@dataclass(frozen=True)
class Device(JsonNoun):
    """One kind of accelerator, by its maker's figures.

    memory_bytes: the card's capacity; the driver keeps about 1 % of it (an A100-40 reports 42.4e9 of 42.9e9 bytes).
    peak_flops: dense matrix FLOP/s, without sparsity, in `peak_format`: "bfloat16", or "float16" where the chip has
        no bfloat16 matrix units (V100, T4).
    memory_bandwidth: bytes/s of its own memory.
    link_bandwidth: bytes/s to the other devices of its node, one direction, for each device.
    devices_per_node: of the usual server. watts: maximum board power, not what a job draws.
    source: the document. as_of: the day it was looked up, YYYY-MM-DD.
    price_per_hour: USD for one device; None where none is known. It has its own `price_source` and `price_as_of`:
        prices age, so whatever uses one must say its date.

    >>> hardware()["A100-80"].peak_flops / 1e12
    312.0
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    devices_per_node: int
    watts: float
    source: str
    as_of: str
    price_per_hour: float | None = None
    price_source: str | None = None
    price_as_of: str | None = None
    peak_format: str = "bfloat16"

    def __post_init__(self) -> None:
        check_positive(
            memory_bytes=self.memory_bytes,
            peak_flops=self.peak_flops,
            memory_bandwidth=self.memory_bandwidth,
            link_bandwidth=self.link_bandwidth,
            watts=self.watts,
        )
        check_count(devices_per_node=self.devices_per_node)
        if self.price_per_hour is not None:
            check_positive(price_per_hour=self.price_per_hour)
            if not self.price_as_of:
                raise InputError(f"price_as_of must say the date of price_per_hour {self.price_per_hour}, got none")
        if self.peak_format not in PEAK_FORMATS:
            raise InputError(f"peak_format must be one of {list(PEAK_FORMATS)}, got {self.peak_format!r}")


@dataclass(frozen=True)
class Cluster(JsonNoun):
    """Devices of one kind in nodes.

    devices: in all; at most one node's, or whole nodes. inter_node_bandwidth: bytes/s that each device can send to
    other nodes, one direction; the default is 200 Gbit/s a device, as in a DGX A100 with eight such adapters.
    link_latency, inter_node_latency: seconds of one message inside a node and between nodes, whatever its length; the
    defaults are those of Calculon's description of an A100 system, to be measured where messages are small.

    >>> Cluster(64, hardware()["A100-80"]).nodes
    8
    """

    devices: int
    device: Device
    inter_node_bandwidth: float = 25e9
    inter_node_latency: float = 2e-5
    link_latency: float = 1e-5

    def __post_init__(self) -> None:
        check_count(devices=self.devices)
        object.__setattr__(self, "devices", int(self.devices))
        if not isinstance(self.device, Device):
            raise InputError(f"device must be a Device, such as hardware()['A100-80'], got {self.device!r}")
        check_positive(inter_node_bandwidth=self.inter_node_bandwidth)
        check_not_negative(inter_node_latency=self.inter_node_latency, link_latency=self.link_latency)
        if self.devices > self.device.devices_per_node and self.devices % self.device.devices_per_node:
            raise InputError(
                f"devices must be at most {self.device.devices_per_node} or a multiple of it (whole nodes of "
                f"{self.device.name}), got {self.devices}"
            )

    @property
    def node_size(self) -> int:
        """Devices in each node that is used."""
        return min(self.devices, self.device.devices_per_node)

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return self.devices // self.node_size


def hardware(path: str | Path | None = None) -> dict[str, Device]:
    """The packaged devices by name, with those of a user's TOML file of the same form put over them.

    path: a file with tables `[device.NAME]` and `[price.NAME]`; an entry of it replaces the packaged one whole. Every
    figure is text with its unit, as in `memory = "80 GiB"`. `planner/hardware.toml` is the example.
    Raises `InputError` with file and entry where a key is unknown or missing, a unit is missing or unknown, or a
    number is not positive.
    """
    packaged = tomllib.loads((files("batchlab.planner") / "hardware.toml").read_text("utf-8"))
    tables = [("hardware.toml", packaged)]
    if path is not None:
        tables.append((str(path), _read(Path(path))))
    devices: dict[str, Device] = {}
    prices: dict[str, dict[str, Any]] = {}
    for file, table in tables:
        if unknown := sorted(set(table) - {"device", "price"}):
            raise InputError(f"{file}: tables must be [device.NAME] or [price.NAME], got [{unknown[0]}]")
        devices |= {name: _device(file, name, entry) for name, entry in _entries(file, table, "device")}
        prices |= {name: _price(file, name, entry) for name, entry in _entries(file, table, "price")}
    if strangers := sorted(set(prices) - set(devices)):
        raise InputError(f"price {strangers[0]!r} is of no known device; known are {sorted(devices)}")
    return {name: replace(device, **prices.get(name, {})) for name, device in devices.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as TOML: {error}") from None


def _entries(file: str, table: Mapping[str, Any], kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    entries = table.get(kind, {})
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        raise InputError(f"{file}: {kind}s must be tables [{kind}.NAME]")
    keys, optional = (DEVICE_KEYS, OPTIONAL_KEYS) if kind == "device" else (PRICE_KEYS, ())
    for name, entry in entries.items():
        if unknown := sorted(set(entry) - {*keys, *optional}):
            raise InputError(f"{file}: {kind} {name!r} has no key {unknown[0]!r}; its keys are {[*keys, *optional]}")
        if missing := [key for key in keys if key not in entry]:
            raise InputError(f"{file}: {kind} {name!r} lacks the key {missing[0]!r}")
    return list(entries.items())


def _device(file: str, name: str, entry: Mapping[str, Any]) -> Device:
    where = f"{file}: device {name!r}"
    if not is_count(entry["devices_per_node"]):
        raise InputError(
            f"{where} devices_per_node must be an integer of at least 1, got {entry['devices_per_node']!r}"
        )
    if (peak_format := entry.get("peak_format", PEAK_FORMATS[0])) not in PEAK_FORMATS:
        raise InputError(f"{where} peak_format must be one of {list(PEAK_FORMATS)}, got {peak_format!r}")
    figures = {key: _figure(where, key, entry[key]) for key in UNITS}
    return Device(
        name=name,
        memory_bytes=figures["memory"],
        peak_flops=figures["peak"],
        memory_bandwidth=figures["memory_bandwidth"],
        link_bandwidth=figures["link_bandwidth"],
        devices_per_node=entry["devices_per_node"],
        watts=figures["power"],
        source=_text(where, "source", entry["source"]),
        as_of=_day(where, entry["as_of"]),
        peak_format=peak_format,
    )


def _price(file: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{file}: price {name!r}"
    amount = entry["usd_per_hour"]
    if isinstance(amount, bool) or not holds(lambda value: 0 < value < float("inf"), amount):
        raise InputError(f"{where} usd_per_hour must be a number > 0, got {amount!r}")
    source, day = _text(where, "source", entry["source"]), _day(where, entry["as_of"])
    return {"price_per_hour": float(amount), "price_source": source, "price_as_of": day}


def _figure(where: str, key: str, text: Any) -> float:
    """A number with its unit, such as "80 GiB", in bytes, FLOP/s, bytes/s or watts."""
    units = UNITS[key]
    parts = text.split() if isinstance(text, str) else []
    if len(parts) != 2 or parts[1] not in units:
        raise InputError(
            f"{where} {key} must be a number and one of the units {list(units)}, as in "
            f'"80 {next(iter(units))}", got {text!r}'
        )
    try:
        number = float(parts[0])
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise InputError(f"{where} {key} must be finite and > 0, got {text!r}")
    return number * units[parts[1]]


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} {key} must be a text that names the document, got {value!r}")
    return value


def _day(where: str, value: Any) -> str:
    try:
        return (value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)).isoformat()[:10]
    except (TypeError, ValueError):
        raise InputError(f"{where} as_of must be a date, as in 2026-11-26, got {value!r}") from None
