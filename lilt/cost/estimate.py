"""What a planned run will cost, from a few of its steps that are really taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

from rich.console import Console

from lilt.build import Splits, build_splits
from lilt.config import TrainConfig
from lilt.cost.entry import Entry
from lilt.cost.plan import Plan, make_plan
from lilt.data import Order, Sample
from lilt.run import align, measure
from lilt.train import RunLog, Trainer
from lilt.train.bill import Bill, shares_of
from lilt.train.check import check
from lilt.train.meter import Meter

STEPPING = ("data", "steps")
EVAL_BATCH = 128  # images at a time


class Laps(Meter):
    """A meter that also remembers how it stood before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.laps: list[dict[str, float]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if part == "data":
            self.laps.append(dict(self.seconds))
        with super().__call__(part):
            yield


@dataclass(frozen=True)
class Pace:
    """What was measured in one process, in seconds: before the first step, a step by part, what the first steps took
    longer, one saving, one pass over each split; on which device, and with how many pairs a step."""

    device: str
    share: int
    starting: float
    step: dict[str, float]
    first: dict[str, float]
    saving: float
    validation: float
    test: float


def estimate(config: TrainConfig, *, steps: int = 20, gpus: int = 1, console: Console) -> Entry:
    """Return what a run would cost: it is built and really trained for some steps, in a folder that is then removed.

    One process is measured, with its share of the batch of all. Raises ValueError as training would, and under a
    launcher of several processes.
    """
    check(config)
    for name, value in (("steps", steps), ("gpus", gpus)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected 1 or more; give a positive whole number")
    if gpus > config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} leaves no pair for each of {gpus} processes; use fewer or a larger batch"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes were started, and an estimate measures one; start it alone, with --gpus N")
    splits = build_splits(config)
    with TemporaryDirectory(prefix="lilt-cost-") as folder:
        short = replace(config, output=folder, resume=False, batch_size=config.batch_size // gpus)
        pace, order = _measure(short, splits, steps, console)
    plan = make_plan(config, order, splits, gpus)
    bill = project(pace, plan, gpus, config.price)
    return Entry("planned run", bill, plan.batch / sum(pace.step.values()), _about(pace, plan, steps, gpus))


def project(pace: Pace, plan: Plan, gpus: int, price: float | None = None) -> Bill:
    """Return the bill of a planned run.

    gpus processes are assumed to be as fast as one alone and to share the evaluation evenly, and each validation to be
    a new best, which is saved.
    """
    seconds = {
        "starting": pace.starting,
        **{part: plan.steps * pace.step[part] + pace.first[part] for part in STEPPING},
        "evaluation": (plan.validations * pace.validation + plan.tests * pace.test) / gpus,
        "saving": plan.states * pace.saving,
    }
    hours = sum(seconds.values()) / 3600
    return Bill(pace.device, gpus, hours, gpus * hours, shares_of(seconds), price=price)


def _measure(config: TrainConfig, splits: Splits, steps: int, console: Console) -> tuple[Pace, Order]:
    # the first batches wait until the data workers have started, and the next were made in advance
    uncounted = max(5, 2 * config.workers + 1)
    whole = uncounted + steps
    short = replace(config, val_split="none", test_split="none", max_steps=whole, warmup_steps=whole)
    # at a log step the device is waited for; after the last the state is saved
    short = replace(short, log_every=uncounted, eval_every=float(whole))
    laps = Laps()
    seen: list[Trainer] = []

    def watch(trainer: Trainer) -> None:
        trainer.meter = laps
        seen.append(trainer)

    report = align(short, console, watch)
    if not report.outcome.finished:
        raise KeyboardInterrupt
    trainer = seen[0]
    half, end = laps.laps[uncounted], laps.seconds
    step = {part: (end[part] - half[part]) / steps for part in STEPPING}
    first = {part: max(0.0, half[part] - uncounted * step[part]) for part in STEPPING}
    with RunLog(report.folder, console) as log:

        def look(samples: list[Sample]) -> None:
            options = {"workers": config.workers, "batch_size": EVAL_BATCH}
            measure(trainer.core, samples, log, "evaluation", max_tokens=config.eval_tokens, **options)

        few = 2 * EVAL_BATCH * max(1, config.workers)
        passes = [one_pass(look, samples, few) for samples in (splits.val, splits.test)]
    assert report.bill is not None
    batches = trainer.batches
    pace = Pace(report.bill.device, batches.batch, end["starting"], step, first, end["saving"], *passes)
    return pace, batches.order


def one_pass(look: Callable[[list[Sample]], None], samples: list[Sample], few: int) -> float:
    """Return the seconds that a look at all samples takes, from looks at a few of them and at half as many."""
    if not samples:
        return 0.0
    _time(look, samples[:8])  # what only the first look takes
    large = _time(look, samples[:few])
    if len(samples) <= few:
        return large
    more = large - _time(look, samples[: few // 2])
    each = more / (few - few // 2) if more > 0 else large / few
    return large + each * (len(samples) - few)


def _time(look: Callable[[list[Sample]], None], samples: list[Sample]) -> float:
    began = time.perf_counter()
    look(samples)
    return time.perf_counter() - began


def _about(pace: Pace, plan: Plan, steps: int, gpus: int) -> str:
    said = (
        f"from {steps} measured steps of {pace.share} pairs; the run has {plan.steps:,} steps and looks at the "
        f"validation split {plan.validations} x, at the test split {plan.tests} x"
    )
    if gpus == 1:
        return said
    return f"{said}; linear scaling assumed: {gpus} processes take {plan.batch} pairs as fast as one takes {pace.share}"
