"""What a finished run cost, read from what it wrote."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from lilt.cost.entry import Entry
from lilt.train import read_metrics
from lilt.train.bill import Bill, check_price
from lilt.train.folder import CONFIG
from lilt.train.log import METRICS


def read_run(run: str, price: float | None = None) -> Entry:
    """Return the cost of a run folder, at its own price or at another.

    Raises ValueError where there is no run, or one that has not come to its end.
    """
    check_price(price)
    folder = Path(run)
    if not (folder / METRICS).is_file():
        raise ValueError(f"{run} holds no {METRICS}; expected the folder of a finished `lilt train`; check the path")
    records = read_metrics(folder)
    last = next((record for record in reversed(records) if "seconds_by_part" in record), None)
    if last is None:
        step = records[-1]["step"] if records else 0
        raise ValueError(
            f"{run} stopped at step {step} and never came to its end; expected a finished run; finish "
            f"it: lilt train --config {folder / CONFIG} --resume"
        )
    if "device_hours" not in last:
        raise ValueError(
            f"{run} was trained by a version of lilt that did not note on how many devices; expected device_hours in "
            f"{METRICS}; train it again"
        )
    bill = Bill(**{field.name: last[field.name] for field in fields(Bill)})
    return Entry(run, bill if price is None else replace(bill, price=price), last["pairs_per_second"])
