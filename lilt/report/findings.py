"""What tasks found out: kept knowledge as one table, other results one a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilt.evaluate import Finished, parse_task
from lilt.evaluate.conserve import Curve
from lilt.report.between import between, by_scale
from lilt.report.markup import Html, cell, el, grid, section, table
from lilt.report.parameters import OUTSIDE, SIDES, heat

STATES = ("before", "after", "kept")
NEAR = 2.0  # percent: a share that changed by less of itself is kept
SIGNS = {"gained": "▲ ", "kept": "● ", "lost": "▼ "}


@dataclass(frozen=True)
class Kept:
    """One value of the towers before and after, and the kept share in percent (None: the value is no share)."""

    name: str
    before: float
    after: float
    kept: float | None

    @property
    def verdict(self) -> str:
        """Gained, kept or lost; "" where more of the value is not more knowledge."""
        if self.kept is None:
            return ""
        return "kept" if abs(self.kept - 100) < NEAR else "gained" if self.kept > 100 else "lost"


def findings(done: Sequence[Finished]) -> Html:
    """Return the section."""
    if not done:
        how = el(
            "p", "No tasks were asked for. To see what the towers have kept, add ", el("code", '--task "conserve(knn)"')
        )
        return section("conservation", "Conservation", how)
    shown: list[Html] = []
    rows = [(task.spec, kept) for task in done for kept in compared(task.values)]
    if rows:
        shown.append(conservation(rows))
    for number, task in enumerate(done):
        shown += _one(task, f"task-{number}")
    return section("conservation", "Conservation and other tasks", *shown)


def compared(values: dict[str, float]) -> list[Kept]:
    """Return the values that were measured before and after."""
    names = [name.removesuffix("/before") for name in values if name.endswith("/before")]
    found = []
    for name in names:
        before, after, kept = (values.get(f"{name}/{state}") for state in STATES)
        if before is not None and after is not None:
            found.append(Kept(name, before, after, kept))
    return found


def conservation(rows: Sequence[tuple[str, Kept]]) -> Html:
    """Return one table of what was gained, kept and lost."""
    several = len({spec for spec, _ in rows}) > 1
    body = []
    for spec, row in rows:
        share = "" if row.kept is None else f"{row.kept:.1f}"
        numbers = (f"{row.before:.2f}", f"{row.after:.2f}", f"{row.after - row.before:+.2f}", share)
        told = el("td", f"{SIGNS.get(row.verdict, '')}{row.verdict}", class_=row.verdict or None)
        body.append((f"{row.name} ({spec})" if several else row.name, [*map(cell, numbers), told]))
    counts = {verdict: sum(row.verdict == verdict for _, row in rows) for verdict in SIGNS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    heads = ("", "before", "after", "change", "kept %", "")
    note = el("p", f"kept % is after / before; within {NEAR:g} % of 100 a value counts as kept.", class_="note")
    return el("div", table(heads, body, f"the towers before and after: {said}"), note)


def _one(task: Finished, name: str) -> list[Html]:
    """Show what a task found beside comparisons, and the error that ended it; name is for ids."""
    shown: list[Html] = []
    what = parse_task(task.spec)
    states = tuple(f"/{state}" for state in STATES)
    rest = {name: value for name, value in task.values.items() if not name.endswith(states)}
    counts = {name: value for name, value in rest.items() if name.startswith("num_")}
    rest = {name: value for name, value in rest.items() if name not in counts}
    if rest and isinstance(what, Curve):
        shown.append(between(name, task.spec, by_scale(rest, [label for label, _ in what.tasks.items])))
    elif places := by_place(rest):
        maps = (heat(f"{task.spec}: {side}", found, lambda value: f"{value:.3g}") for side, found in places.items())
        shown.append(el("div", *maps, class_="tables"))
    elif rest:
        shown.append(grid(("", ""), [(name, f"{value:.4g}") for name, value in rest.items()], task.spec))
    if counts:
        said = ", ".join(
            f"{name.removeprefix('num_').replace('_', ' ')} {value:,.0f}" for name, value in counts.items()
        )
        shown.append(el("p", f"{task.spec}: {said}.", class_="note"))
    if shown or counts:
        about = type(what).__doc__ or ""
        shown.append(el("p", about.splitlines()[0], class_="note"))
    if task.error is not None:
        shown.append(el("p", f"{task.spec} failed: {task.error}", class_="failed"))
    return shown


def by_place(values: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Return values named `vision/block 3/norm` as tower -> place -> role -> value; {} for other names."""
    places: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in values.items():
        side, _, rest = name.partition("/")
        place, _, role = rest.rpartition("/")
        if side not in SIDES or not rest:
            return {}
        if not place and rest.startswith(("block ", "pooled")):  # drift has no roles
            place, role = rest, "value"
        places.setdefault(side, {}).setdefault(place or OUTSIDE, {})[role] = value
    return {side: dict(sorted(found.items(), key=_depth)) for side, found in places.items()}


def _depth(item: tuple[str, object]) -> tuple[bool, int]:
    number = item[0].removeprefix("block ")
    return not number.isdigit(), int(number) if number.isdigit() else 0
