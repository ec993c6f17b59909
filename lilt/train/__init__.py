"""Training."""

from __future__ import annotations

from lilt.train.log import RunLog, read_metrics
from lilt.train.place import Outcome
from lilt.train.trainer import Trainer

__all__ = ["Outcome", "RunLog", "Trainer", "read_metrics"]
