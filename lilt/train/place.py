"""Where a run stands, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lilt.train.meter import Meter


@dataclass
class Place:
    """Where a run stands; part of the resume state.

    micro_batch: pairs at once, None for all: as asked for, less after steps that ran out of memory; proved: steps done
    with so many.
    """

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    micro_batch: int | None = None
    proved: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what resume needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""
        vars(self).update(state)


@dataclass(frozen=True)
class Outcome:
    """How a run ended; peak_bytes are of this process, pairs_per_second of the steps alone."""

    place: Place
    steps: int
    meter: Meter
    pairs_per_second: float
    peak_bytes: int
    bad_images: int

    @property
    def finished(self) -> bool:
        """Say whether the last step was reached."""
        return self.place.step >= self.steps
