"""Hinge ranking: each positive is to be nearer than each negative, by a margin."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lilt.losses.logits import exact, logits
from lilt.losses.relation import Relation, take_part, weigh_rows
from lilt.losses.tiles import Tile, cross, tiled


def hinge_ranking(
    image: Tensor,
    text: Tensor,
    *,
    rows: slice,
    positives: Tensor | None = None,
    ignored: Tensor | None = None,
    valid: Tensor | None = None,
    margin: float = 0.2,
    hardest: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over negatives (or the hardest alone) of max(0, margin - s_p + s_n), averaged over valid rows and directions.

    s are cosines, s_n of a negative and s_p of the row's positive, of several the least similar: a row costs nothing
    when all its positives beat all its negatives by the margin. Arguments are those of `softmax_contrastive`.
    Source: Aytar et al. 2017, arXiv 1706.00932 (all negatives); Faghri et al. 2018, arXiv 1707.05612 (hardest).
    """
    image, text = exact(image), exact(text)
    part = take_part(image, rows, positives, ignored, valid)
    others = part.positives | part.out

    def direction(made: Tensor) -> Tensor:
        farthest = made.masked_fill(~part.positives, math.inf).min(1, keepdim=True).values
        excess = (margin - farthest + made).masked_fill(others, -math.inf)
        cost = excess.max(1).values.relu() if hardest else excess.relu().sum(1)
        return (cost * part.weight).sum() / part.divisor

    made = logits(image[rows], text)
    to_text = direction(made)
    to_image = direction(made.T if len(made) == len(image) else logits(text[rows], image))
    return (to_text + to_image) / 2, {"image_to_text": to_text.detach(), "text_to_image": to_image.detach()}


def chunked_hinge(
    image: Tensor,
    text: Tensor,
    *,
    rows: slice,
    relation: Relation,
    chunk: int,
    margin: float = 0.2,
    hardest: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient from at most chunk x chunk logits at a time.

    Memory: O(chunk^2 + G D). The logits are computed again for the sum over all negatives and in the backward pass.
    """
    image, text = exact(image), exact(text)
    loss, parts = tiled(image, text, None, None, _Hinge(image, rows, relation, chunk, margin, hardest))
    return loss, {"image_to_text": parts[0], "text_to_image": parts[1]}


class _Extreme:
    """The largest value of each row in both directions, and its place, (2, G)."""

    def __init__(self, like: Tensor):
        self.value = like.new_full((2, len(like)), -math.inf)
        self.place = torch.zeros(2, len(like), dtype=torch.long, device=like.device)

    def read(self, tile: Tile, made: Tensor, where: Tensor) -> None:
        """Look at the chosen values of a tile."""
        made = made.masked_fill(~where, -math.inf)
        for side, span, dim in tile.sides:
            value, place = made.max(dim)
            place += tile.first(dim)
            known = self.value[side, span], self.place[side, span]
            self.place[side, span] = place.where(value > known[0], known[1])
            self.value[side, span] = value.maximum(known[0])

    def send(self, tile: Tile, slope: Tensor, amount: Tensor) -> None:
        """Add each row's amount (2, G) to its place, where that lies in the tile."""
        for side, span, dim in tile.sides:
            place = self.place[side, span] - tile.first(dim)
            inside = (place >= 0) & (place < slope.shape[dim])
            place, sent = place.clamp(0, slope.shape[dim] - 1), amount[side, span] * inside
            slope.scatter_add_(dim, place.unsqueeze(dim), sent.unsqueeze(dim))


class _Hinge:
    """Places of the extremes are kept, not found again: a product computed twice may differ in its last bit."""

    def __init__(self, image: Tensor, rows: slice, relation: Relation, chunk: int, margin: float, hardest: bool):
        relation.check(len(image))
        self.relation, self.margin, self.hardest = relation, margin, hardest
        self.tiles = cross(len(image), rows, chunk)
        self.weight = weigh_rows(image, rows, relation.valid) / 2  # of one direction
        self.farthest, self.hard = _Extreme(image), _Extreme(image)  # the least similar positive has the largest -s
        self.cost = image.new_zeros(2, len(image))
        self.active = image.new_zeros(2, len(image))  # negatives that cost something

    def value(self, logits: Callable[[Tile], Tensor]) -> tuple[Tensor, Tensor]:
        for tile in self.tiles:
            made = logits(tile)
            positive, negative = self._relate(tile)
            if self.hardest:
                self.hard.read(tile, made, negative)
            self.farthest.read(tile, made.neg_(), positive)
        if self.hardest:
            self.cost = (self.margin + self.farthest.value + self.hard.value).relu_()
            self.active = (self.cost > 0).to(self.cost.dtype)
        else:
            for tile in self.tiles:
                self._sum(tile, logits(tile))
        parts = 2 * (self.cost * self.weight).sum(1)
        return parts.mean(), parts

    def _relate(self, tile: Tile) -> tuple[Tensor, Tensor]:
        positive, out = self.relation.relate_valid(tile.images, tile.texts)
        return positive, ~(positive if out is None else positive | out)

    def _sum(self, tile: Tile, made: Tensor) -> None:
        """Add what the negatives of a tile cost."""
        _, negative = self._relate(tile)
        for side, span, dim in tile.sides:
            excess = self._excess(made, negative, side, span, dim)
            self.cost[side, span] += excess.sum(dim)
            self.active[side, span] += (excess > 0).sum(dim)

    def _excess(self, made: Tensor, negative: Tensor, side: int, span: slice, dim: int) -> Tensor:
        bound = (self.margin + self.farthest.value[side, span]).unsqueeze(dim)
        return (made + bound).relu_().masked_fill_(~negative, 0.0)

    def slope(self, tile: Tile, logits: Tensor) -> Tensor:
        slope = torch.zeros_like(logits)
        if self.hardest:
            self.hard.send(tile, slope, self.active * self.weight)
        else:
            _, negative = self._relate(tile)
            for side, span, dim in tile.sides:
                active = self._excess(logits, negative, side, span, dim) > 0
                slope += active * self.weight[span].unsqueeze(dim)
        self.farthest.send(tile, slope, -self.active * self.weight)
        return slope
