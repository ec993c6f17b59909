"""Recalls before and after, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilt.report.markup import Html, el, grid, section
from lilt.report.past import RANKS, SIDES, Past

Column = tuple[str, dict[str, Any]]
ARROWS = {"text_to_image": "text → image", "image_to_text": "image → text"}
NAMES = {"median_rank": "median rank (1 is best)"}


def recalls(past: Past, references: Mapping[str, float]) -> Html:
    """Return the section; references are numbers of the data to read the test result against."""
    tests = [("before", past.before), ("after", past.result("test"))]
    columns = [(name, result) for name, result in tests if result is not None]
    chosen = past.result("val")
    shown: list[Html] = []
    if columns:
        shown.append(_block(_title(past, "test"), columns, _against(columns[-1][1], references)))
    if chosen is not None:
        said = f"{_counts(chosen)} It chose the checkpoint: step {past.chosen_step:,}."
        shown.append(_block(_title(past, "val"), [("after", chosen)], said))
    notes = []
    if not columns:
        notes.append(el("p", "No test split was looked at.", class_="absent"))
    elif columns[-1][0] == "before":
        notes.append(
            el("p", "The run has not come to its end: nothing is known of the test split after it.", class_="note")
        )
    return section("recalls", "Recall", *notes, el("div", *shown, class_="tables"))


def _title(past: Past, part: str) -> str:
    kind = {"test": "test split", "val": "validation split"}[part]
    name = past.split(part)
    return f"{kind}, %" if name in (part, None) else f"{kind} ({name}), %"


def _block(title: str, columns: Sequence[Column], note: str) -> Html:
    return el("div", _table(title, columns), el("p", note, class_="note"))


def _table(caption: str, columns: Sequence[Column]) -> Html:
    """Return recalls in percent; of two columns also what changed."""
    rows = [["mean recall", *(f"{result['mean_recall']:.2f}" for _, result in columns)]]
    values = [[result["mean_recall"] for _, result in columns]]
    for side in SIDES:
        for rank in RANKS:
            values.append([result[side][rank] for _, result in columns])
            rows.append([f"{ARROWS[side]} {NAMES.get(rank, rank)}", *(f"{value:.2f}" for value in values[-1])])
    heads = ["", *(name for name, _ in columns)]
    if len(columns) == 2:
        heads.append("change")
        rows = [[*row, f"{after - before:+.2f}"] for row, (before, after) in zip(rows, values, strict=True)]
    return grid(heads, rows, caption)


def _against(result: Mapping[str, Any], references: Mapping[str, float]) -> str:
    said = [_counts(result), f"R@1 of chance, text → image: {100 / result['num_images']:.2f} %."]
    said += [f"{name}: {value:.2f} %." for name, value in references.items()]
    return " ".join(said)


def _counts(result: Mapping[str, Any]) -> str:
    """Say how much was looked at."""
    images, captions, unreadable, cut = (
        int(result.get(f"num_{name}", 0)) for name in ("images", "captions", "unreadable", "cut_captions")
    )
    said = f"{images:,} images, {captions:,} captions"
    if unreadable:
        said += f"; {unreadable:,} images could not be read"
    return f"{said}; {cut:,} captions were cut." if cut else f"{said}."
