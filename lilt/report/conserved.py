"""What the towers of several runs gained, kept and lost, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lilt.report.findings import NEAR, SIGNS, Kept, compared

Measured = list[tuple[str, Kept]]  # with the spec of the task
UNKNOWN = "-"


class Told(NamedTuple):
    """Of which run a file speaks, and what its tasks found before and after."""

    run: str
    measured: Measured


def read_tasks(file: str) -> Told | None:
    """Read what `lilt evaluate RUN --task "conserve(…)" --json` printed, None for a file of another kind."""
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("tasks"), dict) or not isinstance(given.get("run"), str):
        return None
    measured = [(spec, kept) for spec, values in given["tasks"].items() for kept in compared(values)]
    if not measured:
        raise ValueError(
            f"{file} has no values before and after (tasks: {', '.join(given['tasks']) or 'none'}); expected those of "
            'conserve; write it anew: lilt evaluate RUN --task "conserve(knn)" --json'
        )
    return Told(given["run"], measured)


def named(told: Sequence[Measured]) -> list[tuple[Kept, ...]]:
    """Return what each run has kept; where tasks differ, a value goes by the spec of its task too."""
    several = len({spec for measured in told for spec, _ in measured}) > 1
    return [
        tuple(replace(kept, name=f"{kept.name} ({spec})") if several else kept for spec, kept in measured)
        for measured in told
    ]


def grid_of(rows: Sequence[tuple[str, Sequence[Kept]]]) -> list[tuple[str, ...]]:
    """Return the heads and a line for each run: its name, and each value before, after, and the verdict on it."""
    names = list(dict.fromkeys(kept.name for _, every in rows for kept in every))
    lines = [("policy", *names)]
    for label, every in rows:
        known = {kept.name: kept for kept in every}
        lines.append((label, *(_cell(known[name]) if name in known else UNKNOWN for name in names)))
    return lines


def _cell(kept: Kept) -> str:
    share = "" if kept.kept is None else f" ({SIGNS[kept.verdict]}{kept.kept:.1f} %)"
    return f"{kept.before:.2f} → {kept.after:.2f}{share}"


def pieces(lines: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """Yield the columns that stand side by side in so many letters; the first is in each piece."""
    sizes = [2 + max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    piece: list[int] = [0]
    for n in range(1, len(sizes)):
        if len(piece) > 1 and sum(sizes[m] for m in piece) + sizes[n] > width:
            yield piece
            piece = [0]
        piece.append(n)
    yield piece


def legend() -> str:
    """Return what the signs say."""
    signs = ", ".join(f"{sign}{verdict}" for verdict, sign in SIGNS.items())
    return f"before → after of the towers, and after / before in percent: {signs} (within {NEAR:g} % of 100)"
