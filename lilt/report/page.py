"""The report of a run: one file that holds all it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lilt import distributed
from lilt.budgets.plot import check_matplotlib
from lilt.budgets.show import in_bytes
from lilt.evaluate import Setting, Task
from lilt.report.costs import costs, duration
from lilt.report.curves import curves
from lilt.report.findings import findings
from lilt.report.gallery import gallery_section
from lilt.report.look import Seen, look
from lilt.report.markup import Html, el, page, terms
from lilt.report.parameters import parameters
from lilt.report.past import Past, read_past
from lilt.report.recalls import recalls
from lilt.report.recipe import recipe
from lilt.report.style import STYLE
from lilt.train.log import BAD_IMAGES

FILE = "report.html"
PARTS = {
    "curves": "Training", "recalls": "Recall", "parameters": "Trained parameters", "conservation": "Conservation",
    "gallery": "Gallery", "cost": "Cost", "recipe": "Do it again",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """Where a report is, what is missing in it and why, and the tasks that failed."""

    file: Path
    missing: Mapping[str, str]
    failed: Mapping[str, str]


def write_report(
    run: str,
    wanted: Mapping[str, Task],
    setting: Setting,
    console: Console,
    *,
    searches: int = 8,
    overwrite: bool = False,
) -> Written:
    """Write `report.html` into a run folder; the split of setting may be "" for the one that the run was tested on.

    searches: how many captions and how many images the gallery has. What cannot be shown is left out and said.
    Raises ValueError where there is no run, where a report is already, or without matplotlib.
    """
    check_matplotlib("a report")
    past, file = read_past(run), Path(run) / FILE
    if searches < 0:
        raise ValueError(f"gallery={searches}; expected how many captions and images to show; give 0 for none")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} is already there; nothing was changed: replace it with --overwrite, or move it away")
    distributed.barrier()
    seen = look(past, wanted, setting, console, searches)
    if distributed.is_main():
        fresh = file.with_name(f"{FILE}.tmp")
        fresh.write_text(compose(past, seen), encoding="utf-8")
        fresh.replace(file)
    failed = {task.spec: task.error for task in seen.done if task.error is not None}
    return Written(file, seen.missing, failed)


def compose(past: Past, seen: Seen) -> str:
    """Return the page."""
    file = past.folder / BAD_IMAGES
    bad = len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0
    missing = seen.missing.get("model")
    reason = missing or seen.missing.get("gallery", "No gallery was asked for (--gallery 8).")
    links = (el("a", title, href=f"#{name}") for name, title in PARTS.items())
    name = past.folder.absolute().name
    return page(
        f"{name} · lilt report",
        STYLE,
        el("header", *_head(past, name), el("nav", *links, aria_label="parts of this page")),
        el(
            "main",
            curves(past),
            recalls(past, seen.references),
            parameters(past, seen.counts, missing),
            findings(seen.done),
            gallery_section(seen.gallery, reason),
            costs(past, bad),
            recipe(past),
        ),
    )


def _head(past: Past, name: str) -> list[Html]:
    towers = past.contract["towers"]
    pair = el("p", el("code", towers["vision"]["spec"]), " with ", el("code", towers["text"]["spec"]), class_="quiet")
    return [el("h1", name), pair, el("div", terms(_numbers(past)), class_="top")]


def _numbers(past: Past) -> Iterator[tuple[str, str]]:
    """Yield what somebody wants to know first."""
    contract, after, chosen = past.contract, past.result("test"), past.result("val")
    yield "policy", past.policy
    if after is not None:
        before = f"{past.before['mean_recall']:.1f} → " if past.before else ""
        yield "mean recall, test", f"{before}{after['mean_recall']:.1f} %"
    elif chosen is not None:
        yield "mean recall, validation", f"{chosen['mean_recall']:.1f} %"
    yield "trained values", f"{contract['trained']:,} ({100 * contract['trained'] / contract['total']:.3g} %)"
    yield "adapter file", in_bytes(past.adapter_bytes)
    if past.end is not None and "seconds" in past.end:
        yield "wall clock", duration(past.end["seconds"])
