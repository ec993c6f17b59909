"""Costs for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lilt.cost.entry import Entry
from lilt.train.bill import Bill


def facts(bill: Bill) -> Iterator[tuple[str, str]]:
    """Yield what the bill of one run says, line by line; what is not known is left out."""
    for part, share in (bill.shares or {}).items():
        yield f"time in {part}", f"{100 * share:.1f} %"
    yield f"{unit(bill)} ({bill.processes} x {bill.device})", number(bill.device_hours)
    if bill.joules is not None:
        yield "energy", energy(bill.joules)
    if bill.dollars is not None:
        yield f"dollars (at {bill.price:g} an hour)", number(bill.dollars)


def unit(bill: Bill) -> str:
    """Name what device_hours are hours of."""
    return "process-hours" if bill.device == "cpu" else "GPU-hours"


def table(entries: Sequence[Entry]) -> Group:
    """Return a table of entries, one of their shares of time where these are known, and what the numbers rest on."""
    bills = [entry.bill for entry in entries if entry.bill is not None]
    # hours of processes on CPUs and of accelerators are not the same thing
    units = list(dict.fromkeys(unit(bill) for bill in bills))
    parts = list(dict.fromkeys(part for bill in bills for part in bill.shares or {}))
    shown: list[RenderableType] = [
        _grid(entries, ("devices", "hours", "/".join(units), "$/h", "$", "pairs/s", "energy"), _cells)
    ]
    if parts:
        shown += [Text(), _grid(entries, [f"{part} %" for part in parts], lambda entry: _percents(entry, parts))]
    said = [Text(f"{entry.name}: {entry.about}", style="dim") for entry in entries if entry.about]
    if "process-hours" in units:
        said.append(Text("on cpu the hours are those of processes, not of GPUs", style="italic"))
    return Group(*shown, *said)


def _grid(entries: Sequence[Entry], heads: Sequence[str], cells: Callable[[Entry], list[str]]) -> Table:
    """Return a table with a row for each entry; columns that nobody fills are left out."""
    rows = [cells(entry) for entry in entries]
    used = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    grid = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for place in used:
        grid.add_column(heads[place], justify="right")
    for entry, row in zip(entries, rows, strict=True):
        grid.add_row(Text(entry.name), *(row[place] for place in used))
    return grid


def _cells(entry: Entry) -> list[str]:
    bill = entry.bill
    if bill is None:
        return [""] * 7
    return [
        f"{bill.processes:,} x {bill.device}",
        number(bill.hours),
        number(bill.device_hours),
        "" if bill.price is None else f"{bill.price:g}",
        "" if bill.dollars is None else number(bill.dollars),
        "" if entry.pairs_per_second is None else number(entry.pairs_per_second),
        "" if bill.joules is None else energy(bill.joules),
    ]


def _percents(entry: Entry, parts: Sequence[str]) -> list[str]:
    shares = (entry.bill.shares if entry.bill else None) or {}
    return [f"{100 * shares[part]:.1f}" if part in shares else "" for part in parts]


def number(value: float) -> str:
    """Write a number with three figures or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def energy(joules: float) -> str:
    """Write energy in Wh or kWh."""
    hours = joules / 3600
    return f"{number(hours / 1000)} kWh" if hours >= 1000 else f"{number(hours)} Wh"
