"""The course of a training: loss, learning rate, scale, and what the validation split said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lilt.report.chart import Colours, Draw, chart
from lilt.report.markup import Html, el, section
from lilt.report.past import SIDES, Past

SIZE = (5.2, 3.0)
Points = tuple[list[int], list[float]]
SELECT = "mean_recall"


def curves(past: Past) -> Html:
    """Return the section; what a run did not write down is said to be absent."""
    shown = [loss(past), rates(past), scale(past), recall(past)]
    drawn = [figure for figure in shown if figure is not None]
    absent = None
    if not past.looks:
        absent = el("p", "No validation split was looked at, so the last checkpoint is the one that was kept.")
    if not drawn:
        return section("curves", "Training", el("p", "This folder holds no record of a training.", class_="absent"))
    return section("curves", "Training", el("p", _sentence(past)), absent, el("div", *drawn, class_="charts"))


def _sentence(past: Past) -> str:
    last = past.steps[-1] if past.steps else past.looks[-1]
    said = f"{last['step']:,} steps"
    if "epoch" in last:
        said += f", {last['epoch']:g} passes over the training pairs"
    if past.end is None:
        return f"{said} so far; the run has not come to its end."
    return f"{said}; the checkpoint is from step {past.end['best_step']:,}."


def points(lines: Sequence[dict[str, Any]], key: str) -> Points:
    """Return where a value was noted and what it was; NaN where it was no number."""
    known = [line for line in lines if key in line]
    return [line["step"] for line in known], [math.nan if line[key] is None else line[key] for line in known]


def loss(past: Past) -> Html | None:
    """Draw the loss, as it was noted and smoothed."""
    steps, values = points(past.steps, "loss")
    if not steps:
        return None
    smooth = smoothed(values)

    def draw(axes: Any, colours: Colours) -> None:
        axes.plot(steps, values, color=colours.series[0], alpha=0.35, linewidth=1)
        axes.plot(steps, smooth, _style(steps), color=colours.series[0], linewidth=2)
        _mark(axes, colours, past)

    return _figure("loss", "loss of a step, and smoothed", draw, ends("loss", steps, smooth))


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Return the running mean in which what lies n values back counts weight^n; NaN is passed over."""
    total = count = 0.0
    shown = []
    for value in values:
        if not math.isnan(value):
            total, count = weight * total + value, weight * count + 1
        shown.append(total / count if count else math.nan)
    return shown


def rates(past: Past) -> Html | None:
    """Draw the learning rates of the groups that differ."""
    known = [line for line in past.steps if line.get("lr")]
    if not known:
        return None
    steps = [line["step"] for line in known]
    courses = sorted(set(zip(*(line["lr"] for line in known), strict=True)), key=max)

    def draw(axes: Any, colours: Colours) -> None:
        for number, course in enumerate(courses):
            colour = colours.series[number % len(colours.series)]
            axes.plot(steps, course, _style(steps), color=colour, linewidth=2, label=f"peak {max(course):.3g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if len(courses) > 1:
            axes.legend(frameon=False)
        _mark(axes, colours, past)

    said = "; ".join(ends("learning rate", steps, course) for course in courses)
    return _figure("rates", "learning rate", draw, said)


def scale(past: Past) -> Html | None:
    """Draw the factor on the cosines."""
    steps, values = points(past.steps, "scale")
    if not steps:
        return None

    def draw(axes: Any, colours: Colours) -> None:
        axes.plot(steps, values, _style(steps), color=colours.series[3], linewidth=2)
        axes.ticklabel_format(useOffset=False)
        _mark(axes, colours, past)

    return _figure("scale", "scale (1 / temperature)", draw, ends("scale", steps, values))


def recall(past: Past) -> Html | None:
    """Draw what the validation split said: the mean recall, and R@1 both ways."""
    steps, values = points(past.looks, SELECT)
    if not steps:
        return None
    ways = [(side, points(past.looks, f"{side}/R@1")) for side in SIDES]

    def draw(axes: Any, colours: Colours) -> None:
        axes.plot(steps, values, "o-", color=colours.series[2], linewidth=2, markersize=4, label="mean recall")
        for colour, (side, course) in zip(colours.series[4:], ways, strict=False):
            name = f"R@1 {side.replace('_to_', '→')}"
            axes.plot(*course, "o--", color=colour, linewidth=1, markersize=2.5, label=name)
        axes.legend(frameon=False)
        axes.set_ylim(bottom=0)
        _mark(axes, colours, past)

    return _figure("recall", "recall on the validation split, %", draw, ends("mean recall", steps, values))


def ends(what: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """Say in words where a curve begins and ends, for who does not see it."""
    return f"{what} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}"


def _style(steps: Sequence[int]) -> str:
    """Return a line, or points where there are too few to see one."""
    return "-" if len(steps) > 2 else "o-"


def _figure(name: str, title: str, draw: Draw, said: str) -> Html:
    return chart(name, draw, SIZE, said, title)


def _mark(axes: Any, colours: Colours, past: Past) -> None:
    """Mark the step that the checkpoint is from."""
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    if past.looks and past.chosen_step is not None:
        axes.axvline(past.chosen_step, color=colours.ink, linewidth=0.8, linestyle=":")
