"""One row of the advice: how well two towers fit, and what training them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lilt.advise.layers import OUTPUT
from lilt.advise.view import Match, View, match


class Failed(NamedTuple):
    """A tower that could not be looked at, and why."""

    tower: str
    error: str


@dataclass(frozen=True)
class Advice:
    """What is known of a pair of towers before training; layers: all pairs of theirs, the most alike first.

    mutual_knn, cka and their chance are those of the outputs, which the heads will read; best_… those of the layers
    that are most alike. Neighbours are in percent. trainable and step_…: None where the towers cannot take the policy,
    for the reason in refused. step_ms is a rough one: FLOPs of a step over those of a forward, times what the forward
    took here.
    """

    vision: str
    text: str
    mutual_knn: float
    chance: float
    cka: float
    cka_chance: float
    best_vision_layer: str
    best_text_layer: str
    best_mutual_knn: float
    best_cka: float
    pairs: int
    k: int
    policy: str
    layers: Sequence[Match]
    trainable: int | None = None
    step_flops: int | None = None
    step_ms: float | None = None
    step_cost: float | None = None  # relative to the dearest of the rows it is ranked with
    refused: str | None = None


def compare_towers(vision: tuple[str, Mapping[str, View]], text: tuple[str, Mapping[str, View]], policy: str) -> Advice:
    """Compare each layer of one tower with each of the other; their costs are not known yet."""
    found = [match(x, y) for x in vision[1].values() for y in text[1].values()]
    found.sort(key=lambda m: (-m.mutual_knn, -m.cka))
    best = found[0]
    output = next(m for m in found if (m.vision_layer, m.text_layer) == (OUTPUT, OUTPUT))
    some = text[1][OUTPUT].neighbours
    return Advice(
        vision[0],
        text[0],
        output.mutual_knn,
        100 * some.chance,
        output.cka,
        output.cka_chance,
        best.vision_layer,
        best.text_layer,
        best.mutual_knn,
        best.cka,
        len(some.which),
        some.k,
        policy,
        found,
    )


def ranked(rows: Sequence[Advice]) -> list[Advice]:
    """Sort, best first, and say what each step costs relative to the dearest.

    Best is by neighbours of the outputs, not of the best layers: those a tower has in common with its first blocks.
    """
    dearest = max((row.step_flops for row in rows if row.step_flops), default=1)
    costed = [replace(row, step_cost=row.step_flops / dearest) if row.step_flops else row for row in rows]
    return sorted(costed, key=lambda row: (-row.mutual_knn, -row.cka, row.step_flops or 0))
