"""The advice as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilt.advise.advice import Advice
from lilt.advise.layers import OUTPUT
from lilt.advise.step import PROJECTION


def table(rows: Sequence[Advice]) -> Group:
    """Return a table of ranked rows, then who cannot take the policy and why, then what all of it holds for."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("vision", "text"):
        shown.add_column(name, overflow="fold", ratio=1)
    for name in ("kNN %", "CKA", "by chance", "best layers", "trained", "step"):
        shown.add_column(name, justify="right", no_wrap=name not in ("by chance", "best layers"))
    for row in rows:
        layers = " and ".join(dict.fromkeys((row.best_vision_layer, row.best_text_layer)))
        best = "" if layers == OUTPUT else f"{row.best_mutual_knn:.1f} at {layers}"
        trained = "" if row.trainable is None else f"{row.trainable:,}"
        step = "" if row.step_cost is None else f"{row.step_cost:.2f}"
        scores = f"{row.mutual_knn:.1f}", f"{row.cka:.2f}", f"{row.chance:.1f}, {row.cka_chance:.2f}"
        shown.add_row(Text(row.vision), Text(row.text), *scores, best, trained, step)
    refused = [Text(f"{row.vision}, {row.text}: {row.refused}", style="dim") for row in rows if row.refused]
    return Group(shown, *refused, Text(_about(rows[0]), style="italic"))


def _about(row: Advice) -> str:
    return (
        f"{row.pairs:,} pairs; kNN: share of the {row.k} nearest images that the captions have too, by the outputs "
        f"and where it is largest; trained by {row.policy} and {PROJECTION}; step: FLOPs relative to the dearest pair"
    )
