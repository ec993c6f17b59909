"""What a training run will do, counted before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lilt.build import Splits
from lilt.config import TrainConfig
from lilt.data import Batches, Order


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes and how many pairs each has over all processes; how often its state is saved, and how
    often it looks at the validation and the test split."""

    steps: int
    batch: int
    states: int
    validations: int
    tests: int


def make_plan(config: TrainConfig, order: Order, splits: Splits, processes: int) -> Plan:
    """Count what the trainer would do. Raises ValueError where a batch leaves a process without a pair."""
    batches = Batches(order, config.batch_size, world=processes)
    steps = config.max_steps or math.ceil(config.epochs * batches.steps_per_epoch)
    every = max(1, round(config.eval_every * batches.steps_per_epoch))
    states = math.ceil(steps / every)
    return Plan(steps, batches.batch, states, states if splits.val else 0, 2 if splits.test else 0)
