"""Charts: drawn by matplotlib, coloured by the page they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lilt.report.markup import Html, el

Draw = Callable[[Any, "Colours"], None]  # axes, colours


@dataclass(frozen=True)
class Colours:
    """What a chart is drawn in: writing, lines behind it, and one colour for each series."""

    ink: str
    line: str
    series: Sequence[str]


# Okabe and Ito's palette, told apart by the colour-blind
PLAIN = Colours("#333333", "#dddddd", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"))
# colours that nobody draws in; in the page each becomes the variable of its style, light or dark
_MARKED = Colours("#0a0b01", "#0a0b02", tuple(f"#0a0b{16 + n}" for n in range(len(PLAIN.series))))
_VARIABLES = {
    _MARKED.ink: "var(--ink)", _MARKED.line: "var(--line)",
    **{mark: f"var(--series-{n})" for n, mark in enumerate(_MARKED.series)},
}  # fmt: skip
_ABOUT = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # what matplotlib would say of itself


def chart(name: str, draw: Draw, size: tuple[float, float], said: str, title: str | None = None) -> Html:
    """Return a figure as SVG in the page; name keeps its ids apart from those of others, said is for who cannot see."""
    stream = io.BytesIO()
    _render(draw, _MARKED, size, stream, name, format="svg", transparent=True, metadata=_ABOUT)
    svg = stream.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    # its style would hold for all of the page, which has the same rule for charts
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # several charts are in one page, and an id is there once
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for mark, variable in _VARIABLES.items():
        svg = svg.replace(mark, variable)
    head, _, drawing = svg.partition(">")
    opened = re.sub(r' (width|height)="[^"]*"', "", head)
    drawn = Html(f'{opened} role="img" aria-label="{escape(said)}">{drawing}')
    return el("figure", None if title is None else el("figcaption", title), drawn, class_="chart")


def picture(draw: Draw, size: tuple[float, float], path: Path) -> None:
    """Write a figure as a file."""
    _render(draw, PLAIN, size, path, "lilt", dpi=150)


def _render(draw: Draw, colours: Colours, size: tuple[float, float], target: Any, name: str, **options: Any) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # text stays text, in the page's own letters; a $ in a name is no formula; equal charts are equal files
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(inks, colours.ink) | {"axes.edgecolor": colours.line, "grid.color": colours.line}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, colours)
        figure.savefig(target, **options)
