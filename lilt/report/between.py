"""The way from the base towers to the tuned ones: what a curve task found at each scale, as plots and as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lilt.evaluate.conserve import NO_SHARE
from lilt.report.chart import Colours, chart
from lilt.report.markup import Html, el, fold, grid, join
from lilt.report.parameters import SIDES

SIZE = (6.4, 4.0)
STYLES = ("o-", "s--", "^:", "D-.")  # one for each round through the colours
Course = dict[float, float]  # scale -> value


def by_scale(values: Mapping[str, float], tasks: Collection[str]) -> dict[str, dict[str, Course]]:
    """Return values named `0.5/knn/top1` as task -> name -> course."""
    found: dict[str, dict[str, Course]] = {}
    for name, value in values.items():
        scale, _, rest = name.partition("/")
        # a task that goes by its spec may have a / in it
        task = next(task for task in tasks if rest.startswith(f"{task}/"))
        found.setdefault(task, {}).setdefault(rest.removeprefix(f"{task}/"), {})[float(scale)] = value
    return found


def between(name: str, spec: str, courses: Mapping[str, Mapping[str, Course]]) -> Html:
    """Return a plot for each task, of what it measures in percent, and all values as a table; name is for ids."""
    shown = []
    for number, (task, values) in enumerate(courses.items()):
        shares = {key: course for key, course in values.items() if key.rpartition("/")[2] not in NO_SHARE}
        places = any(key.partition("/")[0] in SIDES for key in shares)  # as moved has them: too many for one plot
        if shares and not places:
            shown.append(plot(f"{name}-{number}", f"{spec}: {task}, %", shares))
    scales = sorted({scale for values in courses.values() for course in values.values() for scale in course})
    rows = [
        (f"{task}/{key}", *("" if scale not in course else f"{course[scale]:.4g}" for scale in scales))
        for task, values in courses.items()
        for key, course in values.items()
    ]
    heads = ("scale", *(f"{scale:g}" for scale in scales))
    table = grid(heads, rows, spec)
    return join([el("div", *shown, class_="charts"), fold("The same as a table", table)]) if shown else table


def plot(name: str, title: str, courses: Mapping[str, Course]) -> Html:
    """Draw values in percent by scale, 0 the base towers and 1 the tuned ones."""

    def draw(axes: Any, colours: Colours) -> None:
        for number, (key, course) in enumerate(courses.items()):
            rounds, place = divmod(number, len(colours.series))
            style = STYLES[rounds % len(STYLES)]
            axes.plot(*_points(course), style, color=colours.series[place], linewidth=2, markersize=5, label=key)
        axes.set(xlabel="scale (0: base towers, 1: tuned)", ylabel="%")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    said = "; ".join(_said(key, *_points(course)) for key, course in courses.items())
    return chart(name, draw, SIZE, said, title)


def _points(course: Course) -> tuple[Sequence[float], Sequence[float]]:
    scales = sorted(course)
    return scales, [course[scale] for scale in scales]


def _said(key: str, scales: Sequence[float], values: Sequence[float]) -> str:
    ends = zip((scales[0], scales[-1]), (values[0], values[-1]), strict=True)
    return f"{key} " + " to ".join(f"{value:.4g} at scale {scale:g}" for scale, value in ends)
