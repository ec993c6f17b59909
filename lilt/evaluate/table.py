"""Results as tables for people."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from lilt.evaluate.task import Finished

STATES = ("before", "after", "kept")


def recall_table(result: dict[str, Any], title: str) -> Table:
    """Show the recalls of `evaluate_retrieval` both ways."""
    table = Table("", "text→image", "image→text", title=title)
    for metric in result["text_to_image"]:
        table.add_row(metric, *(f"{result[side][metric]:.2f}" for side in ("text_to_image", "image_to_text")))
    table.add_row("mean recall", f"{result['mean_recall']:.2f}", "", end_section=True)
    for key in ("num_images", "num_captions", "num_unreadable", "num_cut_captions"):
        table.add_row(key.removeprefix("num_").replace("_", " "), f"{result[key]:,}", "")
    return table


def task_table(finished: Finished) -> Table:
    """Show the values of a task one a line; what was measured before and after stands side by side."""
    columns = STATES if any(name.endswith("/before") for name in finished.values) else ("",)
    rows: dict[str, dict[str, str]] = {}
    for name, value in finished.values.items():
        head, _, tail = name.rpartition("/")
        alone = name.removeprefix("num_").replace("_", " ") if columns == ("",) else name
        row, column = (head, tail) if tail in columns else (alone, columns[0])
        rows.setdefault(row, {})[column] = f"{value:,.0f}" if name.startswith("num_") else f"{value:.4g}"
    table = Table("", *columns, title=escape(finished.spec))
    for row, cells in rows.items():
        table.add_row(escape(row), *(cells.get(column, "") for column in columns))
    return table
