"""The comparison as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilt.budgets.compare import Comparison
from lilt.budgets.row import Budget
from lilt.registry import nearest

KEYS = tuple(field.name for field in fields(Budget))


def check_key(key: str) -> None:
    """Raise ValueError for a key that no budget has."""
    if key not in KEYS:
        raise ValueError(f"unknown sort key {key!r}; known: {', '.join(KEYS)}.{nearest(key, KEYS)}")


def sort_rows(rows: Sequence[Budget], key: str) -> list[Budget]:
    """Sort by a key of the budget, smallest first."""
    check_key(key)
    return sorted(rows, key=lambda row: (getattr(row, key), row.trainable, row.policy))


def table(found: Comparison, memory: bool = False) -> Group:
    """Return a table of the budgets, then the policies that are refused and why, then what all of it holds for.

    memory: with a column for all that a training step keeps in memory.
    """
    shown = Table("policy", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("trained", "%", "file", "optimizer", "step/full", "saved", *(("memory",) if memory else ())):
        shown.add_column(name, justify="right")
    for row in found.rows:
        sizes = (row.adapter_bytes, row.optimizer_bytes, row.saved_bytes, row.step_bytes)
        file, optimizer, saved, step = map(in_bytes, sizes)
        cells = (f"{row.trainable:,}", f"{row.percent:.3g}", file, optimizer, f"{row.step_flops_ratio:.2f}", saved)
        shown.add_row(row.policy, *cells, *((step,) if memory else ()))
    refused = [Text(f"{spec}: {reason}", style="dim") for spec, reason in found.refused.items()]
    return Group(shown, *refused, Text(found.about, style="italic"))


def in_bytes(count: int) -> str:
    """Write a number of bytes for people, with three figures."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1000 * 1024 ** (power - 1) or (power == 1 and count >= 1024):
            value = count / 1024**power
            return f"{value:,.{max(0, 2 - len(f'{value:.0f}') + 1)}f} {unit}"
    return f"{count} B"
