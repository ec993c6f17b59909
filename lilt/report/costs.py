"""What a run took: time by part, speed, memory, money."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from lilt.budgets.show import in_bytes
from lilt.cost import facts
from lilt.report.markup import Html, el, section, terms
from lilt.report.past import Past
from lilt.train.bill import Bill


def costs(past: Past, bad_images: int) -> Html:
    """Return the section; bad_images is how many training images could not be read."""
    shown: list[Html] = []
    if past.stopped:
        shown.append(el("p", "The run has not come to its end; its time is noted then.", class_="absent"))
    elif past.end is None:
        shown.append(el("p", "This folder holds no record of a training, nor of its time.", class_="absent"))
    elif parts := past.end.get("seconds_by_part"):
        shown.append(split_of_time(parts))
    else:
        said = "This run was trained by a version of lilt that did not note its time by part."
        shown.append(el("p", said, class_="absent"))
    return section("cost", "Cost", *shown, terms(_facts(past, bad_images)))


def split_of_time(seconds: Mapping[str, float]) -> Html:
    """Return a bar in pieces as long as the parts took, with their names, seconds and shares below."""
    total = sum(seconds.values()) or 1.0
    pieces, names = [], []
    for number, (part, spent) in enumerate(seconds.items()):
        share = 100 * spent / total
        style = f"--share:{share:.3f};background:var(--series-{number})"
        pieces.append(el("span", style=style, title=f"{part} {share:.1f} %"))
        said = f"{part} {duration(spent)} ({share:.1f} %)"
        names.append(el("li", el("i", style=f"background:var(--series-{number})"), said))
    return el("div", el("div", *pieces, class_="split", aria_hidden="true"), el("ul", *names, class_="legend"))


def _facts(past: Past, bad_images: int) -> Iterator[tuple[str, str]]:
    end = past.end or {}
    if "seconds" in end:
        yield "wall clock", duration(end["seconds"])
    if end.get("pairs_per_second"):
        yield "pairs per second", f"{end['pairs_per_second']:.1f}"
    if end.get("peak_bytes"):
        yield "peak memory of a process", in_bytes(int(end["peak_bytes"]))
    yield "adapter file", in_bytes(past.adapter_bytes)
    if bill := bill_of(end):
        # the shares are drawn already
        yield from ((name, value) for name, value in facts(bill) if not name.startswith("time in "))
    skipped = max((line.get("skipped_steps") or 0 for line in past.steps), default=0)
    if skipped:
        yield "steps left out, their gradient not finite", f"{skipped:,}"
    if bad_images:
        yield "training images that could not be read", f"{bad_images:,}"


def bill_of(end: Mapping[str, Any]) -> Bill | None:
    """Return the bill in the last line of a run, None where an older version wrote none."""
    if "device_hours" not in end:
        return None
    return Bill(**{field.name: end[field.name] for field in fields(Bill)})


def duration(seconds: float) -> str:
    """Write seconds for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
