"""What a run costs: seconds by what they went into, and energy where the driver counts it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lilt import distributed

PARTS = ("starting", "data", "steps", "evaluation", "saving")


class Meter:
    """Adds up wall seconds by part, over all the sittings of a run; part of the resume state.

    data is the time steps waited for their batch, starting what was built before the first. device_seconds counts each
    second once for each process. joules are of this process' accelerator, None where the driver of a sitting does not
    count them; an earlier sitting counts with those of the main process.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.device_seconds = 0.0
        self.earlier: float | None = 0.0  # joules of earlier sittings
        self.start = _joules()

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    @property
    def joules(self) -> float | None:
        """Energy so far."""
        now = _joules()
        return None if now is None or self.start is None or self.earlier is None else self.earlier + now - self.start

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens inside as a part; what an error cut short counts too."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[part] += spent
            self.device_seconds += spent * distributed.world_size()

    def include(self, other: Meter) -> None:
        """Count what another meter of this sitting, begun earlier, has counted too."""
        for part, spent in other.seconds.items():
            self.seconds[part] += spent
        self.device_seconds += other.device_seconds
        self.start = other.start

    def state_dict(self) -> dict[str, Any]:
        """Return what resume needs."""
        return {"seconds": dict(self.seconds), "device_seconds": self.device_seconds, "joules": self.joules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where an earlier sitting stopped."""
        self.seconds, self.device_seconds = dict(state["seconds"]), state["device_seconds"]
        self.earlier, self.start = state["joules"], _joules()


def _joules() -> float | None:
    """Return the energy counter of the current accelerator; the driver starts it when it is loaded."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml  # type: ignore[import-not-found]  # beside some builds of torch; it is asked for and not required
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1000
    except pynvml.NVMLError:
        return None
