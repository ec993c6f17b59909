"""What a run took: devices x hours x dollars per device-hour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lilt import distributed
from lilt.train.meter import Meter


@dataclass(frozen=True)
class Bill:
    """What a run took, on processes that drive one device each.

    hours are of the wall clock, device_hours those of all devices (on "cpu": of all processes), which differ from
    processes x hours where a run went on with another number. shares of the hours by part add up to one. price is in
    dollars per device-hour, joules are of all devices; what is not known is None.
    """

    device: str
    processes: int
    hours: float
    device_hours: float
    shares: dict[str, float] | None = None
    joules: float | None = None
    price: float | None = None

    @property
    def dollars(self) -> float | None:
        """Device-hours x price."""
        return None if self.price is None else self.device_hours * self.price

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "dollars": self.dollars}


def write_bill(meter: Meter, device: torch.device, price: float | None) -> Bill:
    """Return the bill of all ranks so far; all of them have to ask for it."""
    joules = distributed.gather_objects(meter.joules)
    return Bill(
        device_name(device),
        distributed.world_size(),
        meter.total / 3600,
        meter.device_seconds / 3600,
        shares_of(meter.seconds),
        None if None in joules else sum(joules),
        price,
    )


def device_name(device: torch.device) -> str:
    """Return "cpu", or what an accelerator is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def shares_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of the sum."""
    total = sum(seconds.values())
    return {part: spent / total if total else 0.0 for part, spent in seconds.items()}


def check_price(price: float | None) -> None:
    """Raise ValueError for a price that none can be."""
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(
            f"price={price}; expected dollars per accelerator-hour, 0 or more; give what an hour of one accelerator "
            "costs, or leave it out"
        )
