"""Limits on a budget: `1%` or `2M` trained values, `0.5` of a full step, `8GiB` of memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lilt.budgets.row import Budget

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """The most that one number of a budget may be."""

    option: str  # as written on the command line
    text: str
    key: str  # of Budget
    most: float

    def allows(self, row: Budget) -> bool:
        """Say whether a row is within this limit."""
        return bool(getattr(row, self.key) <= self.most)


def parse_limits(max_trainable: str = "", max_step: str = "", max_memory: str = "") -> list[Limit]:
    """Read the limits as they are written; an empty one is none."""
    limits = []
    if max_trainable.strip().endswith("%"):
        share = _number(max_trainable, {"%": 1}, "max_trainable", "a share such as 1% or a count such as 2M")
        limits.append(Limit("max_trainable", max_trainable, "percent", share))
    elif max_trainable:
        count = _number(max_trainable, _COUNTS, "max_trainable", "a share such as 1% or a count such as 2M")
        limits.append(Limit("max_trainable", max_trainable, "trainable", count))
    if max_step:
        ratio = _number(max_step, {"": 1}, "max_step", "a part of a full step such as 0.5")
        limits.append(Limit("max_step", max_step, "step_flops_ratio", ratio))
    if max_memory:
        size = _number(max_memory, _BYTES, "max_memory", "a size such as 8GiB, 500MB or a number of bytes")
        limits.append(Limit("max_memory", max_memory, "step_bytes", size))
    return limits


def keep(rows: Sequence[Budget], limits: Sequence[Limit]) -> list[Budget]:
    """Return the rows within all limits. Raises ValueError if none is, naming first the limit that leaves out most."""
    left = [row for row in rows if all(limit.allows(row) for limit in limits)]
    if left or not rows:
        return left
    said = []
    for limit in sorted(limits, key=lambda limit: sum(map(limit.allows, rows))):
        least = min(rows, key=lambda row: float(getattr(row, limit.key)))
        out = sum(not limit.allows(row) for row in rows)
        smallest = f"{getattr(least, limit.key):,.6g}"
        said.append(f"{limit.option}={limit.text} leaves out {out} (smallest {limit.key}: {smallest}, {least.policy})")
    raise ValueError(
        f"none of {len(rows)} policies is within the limits: {', '.join(said)}; raise the first, or leave it out"
    )


def _number(text: str, units: dict[str, int], option: str, expected: str) -> float:
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-z%]*)", text.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{option}={text!r} cannot be read; expected {expected}; write it like that")
    value = float(re.sub("[_,]", "", match[1])) * units[match[2]]
    if value <= 0:
        raise ValueError(f"{option}={text!r} leaves nothing; expected {expected}; give more than 0")
    return value
