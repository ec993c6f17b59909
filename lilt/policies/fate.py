"""What became of every parameter of a tower, and by which rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lilt.towers.base import Tower


class Fate(NamedTuple):
    """One parameter: its name in the tower, how many values it has, whether it is trained, by whose rule and why."""

    name: str
    values: int
    trained: bool
    rule: str
    why: str


def fates(tower: Tower) -> list[Fate]:
    """Return the fate of each parameter of a tower, in its own order; before a policy is applied nothing is decided."""
    decided = tower.fates or {}
    rows = []
    for name, parameter in tower.body.named_parameters():
        edit = decided.get(name)
        rule, why = (edit.rule, edit.why) if edit is not None else ("", "no policy opens it")
        rows.append(Fate(name, parameter.numel(), parameter.requires_grad, rule, why))
    return rows


def summary(rows: Iterable[Fate]) -> dict[tuple[str, str], int]:
    """Return how many trained values each rule has, by (rule, why)."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.trained:
            counts[row.rule, row.why] = counts.get((row.rule, row.why), 0) + row.values
    return counts
