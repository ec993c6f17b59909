"""Symmetric InfoNCE (CLIP): which of all texts belongs to an image, and which of all images to a text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lilt.losses.logits import exact, logits
from lilt.losses.relation import Relation, take_part, weigh_rows
from lilt.losses.tiles import Tile, cross, tiled


def softmax_contrastive(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    rows: slice,
    positives: Tensor | None = None,
    ignored: Tensor | None = None,
    valid: Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE of rows that belong together, averaged over valid rows and both directions.

    image and text (G, D) are already gathered and have unit rows; rows selects the B that are ours; scale > 0 is a
    scalar. positives (B, G) is boolean, by default row i belongs to column rows.start + i; several positives share the
    weight. ignored (B, G) pairs count neither as positive nor as negative. valid (G,) excludes padding rows. The
    mean of the returned value over ranks is the loss of the joint batch.
    A row costs -sum_j q_j log p_j with q_j = (1 - smoothing) [j in P] / |P| + smoothing [j in A] / |A|, where P are its
    positives and A the columns that take part: valid and not ignored.
    Raises ValueError when a valid row has no positive (on an accelerator the loss is NaN).
    Source: Radford et al. 2021, fig. 3; several positives as in Khosla et al. 2020, L_out; smoothing as in Szegedy et
    al. 2016.
    """
    image, text = exact(image), exact(text)
    part = take_part(image, rows, positives, ignored, valid)
    target = (1 - smoothing) * _shares(part.positives, image.dtype)
    if smoothing:
        target = target + smoothing * _shares(~part.out, image.dtype)

    def direction(made: Tensor) -> Tensor:
        below = made.masked_fill(part.out, -math.inf).logsumexp(1)
        return ((below - (made * target).sum(1)) * part.weight).sum() / part.divisor

    made = logits(image[rows], text, scale)
    to_text = direction(made)
    # where all rows are ours, both directions read one matrix
    to_image = direction(made.T if len(made) == len(image) else logits(text[rows], image, scale))
    return (to_text + to_image) / 2, {"image_to_text": to_text.detach(), "text_to_image": to_image.detach()}


def _shares(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    return chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp(min=1)


def chunked_softmax(
    image: Tensor, text: Tensor, scale: Tensor, *, rows: slice, relation: Relation, chunk: int, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient from at most chunk x chunk logits at a time.

    Memory: O(chunk^2 + G D). The backward pass computes the logits again.
    """
    image, text = exact(image), exact(text)
    loss, parts = tiled(image, text, scale, None, _Softmax(image, rows, relation, chunk, smoothing))
    return loss, {"image_to_text": parts[0], "text_to_image": parts[1]}


class _Softmax:
    """Statistics (2, G) of both directions, read off tile by tile; rows that are not ours stay without weight."""

    def __init__(self, image: Tensor, rows: slice, relation: Relation, chunk: int, smoothing: float):
        relation.check(len(image))
        self.relation, self.smoothing = relation, smoothing
        self.tiles = cross(len(image), rows, chunk)
        self.weight = weigh_rows(image, rows, relation.valid) / 2  # of one direction
        self.below = image.new_full((2, len(image)), -math.inf)
        # of the positives, and of all columns that take part: how many, and the sum of their logits
        self.near_count, self.near_sum, self.all_count, self.all_sum = image.new_zeros(4, 2, len(image))

    def value(self, logits: Callable[[Tile], Tensor]) -> tuple[Tensor, Tensor]:
        for tile in self.tiles:
            self._read(tile, logits(tile))
        self.below = self.below.where(self.weight > 0, 0.0)
        self.near_share = (1 - self.smoothing) / self.near_count.clamp(min=1)
        self.all_share = self.smoothing / self.all_count.clamp(min=1)
        cost = self.below - self.near_share * self.near_sum - self.all_share * self.all_sum
        parts = 2 * (cost * self.weight).sum(1)
        return parts.mean(), parts

    def _read(self, tile: Tile, made: Tensor) -> None:
        """Add the logits of a tile to the statistics."""
        positive, out = self.relation.relate_valid(tile.images, tile.texts)
        near = made.where(positive, 0.0)
        whole = made if out is None else made.masked_fill(out, 0.0)
        for side, span, dim in tile.sides:
            self.near_sum[side, span] += near.sum(dim)
            self.near_count[side, span] += positive.sum(dim)
            if self.smoothing:
                self.all_sum[side, span] += whole.sum(dim)
                self.all_count[side, span] += made.shape[dim] if out is None else (~out).sum(dim)
        del near, whole
        if out is not None:
            made.masked_fill_(out, -math.inf)
        for side, span, dim in tile.sides:
            self.below[side, span] = torch.logaddexp(self.below[side, span], made.logsumexp(dim))

    def slope(self, tile: Tile, logits: Tensor) -> Tensor:
        positive, out = self.relation.relate_valid(tile.images, tile.texts)
        if out is not None:
            logits.masked_fill_(out, -math.inf)
        slope = torch.zeros_like(logits)
        for side, span, dim in tile.sides:
            weight = self.weight[span].unsqueeze(dim)
            slope.addcmul_((logits - self.below[side, span].unsqueeze(dim)).exp_(), weight)
            slope -= positive * (self.near_share[side, span].unsqueeze(dim) * weight)
            if self.smoothing:
                share = self.all_share[side, span].unsqueeze(dim) * weight
                slope -= share if out is None else ~out * share
        return slope
