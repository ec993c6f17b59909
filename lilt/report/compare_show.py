"""Runs side by side: as a table, a picture and a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilt.budgets.plot import check_matplotlib
from lilt.budgets.show import in_bytes
from lilt.report.chart import Colours, chart, picture
from lilt.report.compare import Row, result_file
from lilt.report.conserved import grid_of, legend, pieces
from lilt.report.costs import duration
from lilt.report.findings import Kept
from lilt.report.markup import el, grid, page, section
from lilt.report.parameters import short
from lilt.report.style import STYLE

HEADS = ("run", "policy", "trained", "%", "before", "mean R", "t→i R@1", "i→t R@1", "time", "memory", "adapter")
MARK = " *"
SIZE = (8.0, 5.0)
NEAR = 14  # points: a name further away has a line to its point
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
LONGEST = 32  # letters of a name in a picture
# where a name may stand: offsets from its point in points, nearest first, and which of its ends is there
PLACES = [
    (dx, dy, across)
    for far in range(24)
    for dx, dy, across in (
        (0, 13 + 14 * far, "center"), (0, -13 - 14 * far, "center"), (9, 14 * far, "left"), (-9, 14 * far, "right"),
        (9, -14 * far, "left"), (-9, -14 * far, "right"),
    )
]  # fmt: skip


def compare_table(rows: Sequence[Row], split: str, width: int = 120) -> Group:
    """Return the table and, below it, what cannot be compared; in two pieces where it is wider than so many letters."""
    lines = [HEADS, *(cells(row) for row in rows)]
    needed = sum(1 + max(len(line[n]) for line in lines) for n in range(len(HEADS)))
    every = tuple(range(len(HEADS)))
    fitting = [every] if needed <= width else [every[:2] + every[4:8], every[:4] + every[8:]]
    shown = [_grid(lines, piece, 2) for piece in fitting]
    told = [Text(note, style="italic") for note in notes(rows, split)]
    if not any(row.conserved for row in rows):
        return Group(*shown, *told)
    kept = grid_of(_kept(rows))
    below = [_grid(kept, piece, 1) for piece in pieces(kept, width)]
    return Group(*shown, *told, Text(), *below, Text(legend(), style="italic"))


def _kept(rows: Sequence[Row]) -> list[tuple[str, Sequence[Kept]]]:
    return [(name, row.conserved) for row, name in zip(rows, labels(rows), strict=True) if row.conserved]


def _grid(lines: Sequence[Sequence[str]], columns: Sequence[int], words: int) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for n in columns:
        shown.add_column(
            Text(lines[0][n]), justify="right" if n >= words else "left", no_wrap=n >= words, overflow="fold"
        )
    for line in lines[1:]:
        shown.add_row(*(Text(line[n]) for n in columns))
    return shown


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text; what is not known is a dash."""
    recalls = (row.mean_recall_before, row.mean_recall, row.text_to_image_r1, row.image_to_text_r1)
    return (
        row.run + (MARK if row.differs else ""),
        row.policy,
        f"{row.trained:,}",
        f"{row.percent:.3g}",
        *("-" if value is None else f"{value:.2f}" for value in recalls),
        "-" if row.seconds is None else duration(row.seconds),
        "-" if row.peak_bytes is None else in_bytes(row.peak_bytes),
        in_bytes(row.adapter_bytes),
    )


def notes(rows: Sequence[Row], split: str) -> Iterator[str]:
    """Yield what the numbers are of, and which rows cannot be compared with the others and why."""
    yield f"recalls in percent on the {split} split, as each run noted them; before: the untrained model"
    for row in rows:
        if row.differs:
            yield f"*{row.run} differs from the first run in: {', '.join(row.differs)}; its numbers do not compare"
        if not row.finished:
            yield f"{row.run} has not come to its end"
        if row.measure is not None:
            yield f"{row.run} has not been measured: {row.measure}, then compare {result_file(row.run)}"


def check_page(file: str, overwrite: bool = False) -> Path:
    """Return where a page can be written. Raises ValueError when it cannot, before anything is read."""
    path = Path(file)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"html={file}: unknown ending; expected .html; rename it")
    if not path.parent.is_dir():
        raise ValueError(f"html={file}: there is no folder {path.parent}; expected one that exists; make it first")
    if path.exists() and not overwrite:
        raise ValueError(
            f"html={file} is already there; nothing was changed: replace it with --overwrite, or rename it"
        )
    check_matplotlib("html")
    return path


def check_drawable(rows: Sequence[Row], split: str) -> None:
    """Raise ValueError where no run has a recall to draw."""
    if all(row.mean_recall is None for row in rows):
        raise ValueError(
            f"none of {len(rows)} runs has a recall on its {split} split; expected one or more to draw; finish the "
            "runs, or choose the other split"
        )


def compare_plot(rows: Sequence[Row], split: str, path: Path) -> None:
    """Write mean recall against trained values as a picture."""
    picture(lambda axes, colours: draw(axes, colours, rows, split), SIZE, path)


def compare_page(rows: Sequence[Row], split: str, path: Path) -> None:
    """Write plot and table as one page."""
    shown = [row for row in rows if row.mean_recall is not None]
    best = [f"{name} {row.mean_recall:.2f}" for row, name in zip(shown, labels(shown), strict=True)]
    said = f"mean recall on the {split} split by trained values, fewest first: {', '.join(best)}"
    plot = chart("compare", lambda axes, colours: draw(axes, colours, rows, split), SIZE, said)
    table = grid(HEADS, [cells(row) for row in rows], "the fewest trained values first", words=2)
    told = [el("p", note, class_="note") for note in notes(rows, split)]
    title = f"{len(rows)} runs side by side"
    parts = [section("plot", "Mean recall", plot), section("table", "Runs", table, *told)]
    if any(row.conserved for row in rows):
        heads, *lines = grid_of(_kept(rows))
        kept = grid(heads, lines, "the towers before and after")
        parts.append(section("conservation", "Gained, kept and lost", kept, el("p", legend(), class_="note")))
    body = el("header", el("h1", title)), el("main", *parts)
    path.write_text(page(title, STYLE, *body), encoding="utf-8")


def draw(axes: Any, colours: Colours, rows: Sequence[Row], split: str) -> None:
    """Draw mean recall against trained values; runs that do not compare are hollow, models as they are are lines."""
    shown = [row for row in rows if row.mean_recall is not None]
    every = list(zip(shown, labels(shown), strict=True))
    known = [(row, name) for row, name in every if row.trained]
    for row, _ in known:
        face = "none" if row.differs else colours.series[0]
        axes.plot(row.trained, row.mean_recall, "o", markersize=8, color=colours.series[0], markerfacecolor=face)
    lines = [_line(axes, colours, row, name) for row, name in every if not row.trained]
    axes.set_xscale("log")
    axes.set(xlabel="trained values", ylabel=f"mean recall, {split} split, %")
    axes.margins(x=0.14)
    axes.set_ylim(0, 1.15 * max(row.mean_recall or 0 for row, _ in every) or 1)
    if known:
        _scale_ticks(axes, [row.trained for row, _ in known])
    _write_labels(axes, colours, [(row.trained, row.mean_recall or 0.0, name) for row, name in known], lines)
    if any(row.differs for row, _ in every):
        axes.set_title("hollow, or with *: differs from the first run, does not compare", fontsize=9)


def labels(rows: Sequence[Row]) -> list[str]:
    """Return a name for each: a run's policy, with its folder where several have the same; a model's own."""
    policies = [row.policy for row in rows]
    folders = [Path(row.run).absolute().name for row in rows]
    return [
        (row.policy if policies.count(row.policy) == 1 else f"{row.policy} ({folder})")
        if row.trained
        else f"{folder}, {row.policy}{MARK if row.differs else ''}"
        for row, folder in zip(rows, folders, strict=True)
    ]


def shortened(name: str) -> str:
    """Return a name as it fits into a picture; the table has the whole."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _line(axes: Any, colours: Colours, row: Row, name: str) -> Any:
    """Draw a model that nothing was trained of as a line across, with its name on it."""
    axes.axhline(row.mean_recall, linestyle="--", linewidth=1.5, color=colours.series[1])
    at = (0.01, row.mean_recall)
    return axes.annotate(
        shortened(name), at, (0, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=9
    )


def _scale_ticks(axes: Any, counts: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    # over few decades the powers of ten alone would leave the axis without a number
    subs = (1.0,) if max(counts) > 1000 * min(counts) else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _write_labels(axes: Any, colours: Colours, points: Sequence[tuple[int, float, str]], others: Sequence[Any]) -> None:
    """Write each name beside its point, where it meets no other name, no point and none of the other texts."""
    figure = axes.figure
    figure.draw_without_rendering()  # now it is known where everything stands
    renderer = figure.canvas.get_renderer()
    spots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [text.get_window_extent(renderer).padded(2) for text in others]
    for (x, y, name), spot in zip(points, spots, strict=True):
        text = axes.annotate(shortened(name), (x, y), PLACES[0][:2], fontsize=9, textcoords="offset points")
        text.set_in_layout(False)  # or it would move the axes, and with them all points
        rest = [other for other in spots if math.dist(other, spot) > 1]
        for dx, dy, across in PLACES:
            text.set(position=(dx, dy), horizontalalignment=across, verticalalignment="center")
            extent = text.get_window_extent(renderer).padded(2)
            free = not any(extent.overlaps(box) for box in taken) and not any(extent.contains(*point) for point in rest)
            if free and axes.bbox.contains(*extent.min) and axes.bbox.contains(*extent.max):
                break
        else:  # nothing is free: rather on another than far away
            dx, dy, across = PLACES[0]
            text.set(position=(dx, dy), horizontalalignment=across)
            extent = text.get_window_extent(renderer)
        taken.append(extent)
        if abs(dy) > NEAR:
            end = (dx, dy - math.copysign(NEAR / 2, dy))
            leader = LEADER | {"color": colours.ink}
            axes.annotate("", (x, y), end, textcoords="offset points", arrowprops=leader).set_in_layout(False)
