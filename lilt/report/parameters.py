"""Where the trained parameters are: by tower, layer and role."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lilt.model import TwoTower
from lilt.policies.edits import Edit, Open
from lilt.report.chart import Colours, chart
from lilt.report.markup import Html, cell, el, fold, section, table
from lilt.report.past import Past
from lilt.towers import Tower
from lilt.towers.anatomy import ROLES

SIDES = ("vision", "text")
OUTSIDE = "outside blocks"
ADDED = "added layers"  # what a policy adds to more than one weight
Places = dict[str, dict[str, int]]  # place -> role -> trained values


def parameters(past: Past, counts: Mapping[str, Places] | None, reason: str | None = None) -> Html:
    """Return the section; counts are those of `count_trained`, None where the towers are not at hand for a reason."""
    contract = past.contract
    share = 100 * contract["trained"] / contract["total"]
    said = f"{contract['trained']:,} of {contract['total']:,} values are trained ({share:.3g} %). Policy: "
    shown: list[Html] = [el("p", said, el("code", past.policy))]
    if counts is None:
        shown += [el("p", reason, class_="absent"), el("p", _from_names(contract["tensors"]), class_="note")]
        return section("parameters", "Trained parameters", *shown)
    charts = [bars(part, places) for part, places in counts.items() if places]
    bare = [side for side in SIDES if not counts[side]]
    shown += [el("p", f"Nothing is trained in the {part} tower.", class_="note") for part in bare]
    shown.append(el("div", *charts, class_="columns"))
    tables = [heat(part, places, lambda value: f"{value:,.0f}") for part, places in counts.items() if places]
    shown.append(fold("The same as tables", *tables))
    return section("parameters", "Trained parameters", *shown)


def count_trained(core: TwoTower) -> dict[str, Places]:
    """Return how many values are trained in each place and role of both towers, and of the heads."""
    found = {side: _in_tower(getattr(core, side)) for side in SIDES}
    heads: Places = {}
    for name, parameter in core.trained().items():
        part, _, _ = name.partition(".")
        if part not in found:
            heads.setdefault(part, {"heads": 0})["heads"] += parameter.numel()
    return {**found, "heads": heads}


def _in_tower(tower: Tower) -> Places:
    leaves = {leaf.path: leaf.role for leaf in tower.anatomy.leaves}
    places: Places = {place: {} for place in (OUTSIDE, *(f"block {n}" for n in range(len(tower.blocks))))}
    for name, parameter in tower.body.named_parameters():
        if not parameter.requires_grad:
            continue
        edit = (tower.fates or {}).get(name)
        block = next((n for n, path in enumerate(tower.anatomy.blocks) if name.startswith(f"{path}.")), None)
        roles = places[OUTSIDE if block is None else f"block {block}"]
        role = leaves.get(_module(name, edit), ADDED)
        roles[role] = roles.get(role, 0) + parameter.numel()
    if not places[OUTSIDE]:
        del places[OUTSIDE]
    return places if any(places.values()) else {}


def _module(name: str, edit: Edit | None) -> str:
    """Return the path of the module that a trained parameter belongs to or was added to."""
    return name.rpartition(".")[0] if edit is None or isinstance(edit, Open) else edit.path


def bars(part: str, places: Places) -> Html:
    """Draw a bar for each place, first at the top, in pieces of its roles."""
    names = list(places)
    roles = _roles(places)

    def draw(axes: Any, colours: Colours) -> None:
        left = [0] * len(names)
        for number, role in enumerate(roles):
            widths = [places[name].get(role, 0) for name in names]
            axes.barh(names, widths, left=left, height=0.72, color=colours.series[number], label=role)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_xlim(0, 1.04 * max(left))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.xaxis.set_major_locator(_few())
        axes.set_xlabel("trained values")
        if roles != ["heads"]:
            axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)

    total = sum(sum(values.values()) for values in places.values())
    largest = max(names, key=lambda name: sum(places[name].values()))
    said = f"{total:,} trained values in {part}; most of them in {largest}"
    title = f"{part}: {total:,}" if part == "heads" else f"{part} tower: {total:,}"
    return chart(f"trained-{part}", draw, (5.2, 1.3 + 0.24 * len(names)), said, title)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)


def _roles(places: Mapping[str, Mapping[str, float]]) -> list[str]:
    present = {role for values in places.values() for role in values}
    order = [*ROLES, ADDED]
    return sorted(present, key=lambda role: order.index(role) if role in order else len(order))


def short(value: float) -> str:
    """Write a number for an axis: 200k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def heat(part: str, places: Mapping[str, Mapping[str, float]], show: Callable[[float], str]) -> Html:
    """Return a table of places and roles in which larger values stand on a stronger colour."""
    roles = _roles(places)
    largest = max((value for values in places.values() for value in values.values()), default=0) or 1

    def shaded(value: float | None) -> Html:
        if value is None:
            return cell("")
        return el("td", show(value), class_="number heat", style=f"--share:{value / largest:.3f}")

    rows = ((name, [shaded(values.get(role)) for role in roles]) for name, values in places.items())
    return table(("", *roles), rows, part)


def _from_names(tensors: Mapping[str, Sequence[int]]) -> str:
    """Say what the checkpoint alone tells: its values by part."""
    sums: dict[str, int] = {}
    for name, shape in tensors.items():
        part, _, _ = name.partition(".")
        sums[part] = sums.get(part, 0) + math.prod(shape)
    return "By part: " + ", ".join(f"{part} {count:,}" for part, count in sums.items()) + "."
