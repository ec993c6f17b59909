"""Sigmoid loss (SigLIP): does this text belong to this image, asked of each pair alone."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lilt.losses.logits import exact, logits
from lilt.losses.relation import Relation, count_rows, take_part
from lilt.losses.tiles import Tile, strip, tiled


def sigmoid_contrastive(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rows: slice,
    positives: Tensor | None = None,
    ignored: Tensor | None = None,
    valid: Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of our images with all texts, summed over texts and averaged over valid images.

    A row costs -sum_j log sigmoid(z_j l_j) with l_j = scale * cosine_j + bias, z_j = 1 for its positives and -1 for the
    others; ignored pairs and padding are left out. smoothing s asks each pair for 1 - s / 2 and s / 2 in place of 1 and
    0, which adds s z_j l_j / 2. Arguments are those of `softmax_contrastive`, with a scalar bias; the texts' side needs
    no second direction, for the sum over all ranks holds each pair once.
    Source: Zhai et al. 2023, arXiv 2303.15343, algorithm 1; learned scale from 10 and bias from -10. Smoothing as in
    Szegedy et al. 2016, of two classes.
    """
    image, text = exact(image), exact(text)
    part = take_part(image, rows, positives, ignored, valid)
    made = logits(image[rows], text, scale, bias)
    signed = made.where(part.positives, -made)
    each = -F.logsigmoid(signed)
    if smoothing:
        each = each + smoothing / 2 * signed
    cost = each.masked_fill(part.out, 0.0) * part.weight.unsqueeze(1)
    loss, near = cost.sum() / part.divisor, cost.detach().where(part.positives, 0.0).sum() / part.divisor
    return loss, {"positive": near, "negative": loss.detach() - near}


def chunked_sigmoid(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rows: slice,
    relation: Relation,
    chunk: int,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient from at most chunk x chunk logits at a time.

    Memory: O(chunk^2 + G D). The backward pass computes the logits again.
    """
    image, text = exact(image), exact(text)
    loss, parts = tiled(image, text, scale, bias, _Sigmoid(image, rows, relation, chunk, smoothing))
    return loss, {"positive": parts[0], "negative": parts[1]}


class _Sigmoid:
    """Each pair stands alone, so there is nothing to remember."""

    def __init__(self, image: Tensor, rows: slice, relation: Relation, chunk: int, smoothing: float):
        relation.check(len(image))
        self.relation, self.smoothing = relation, smoothing
        self.tiles = strip(len(image), rows, chunk)
        self.count = count_rows(image, rows, relation.valid)

    def value(self, logits: Callable[[Tile], Tensor]) -> tuple[Tensor, Tensor]:
        # filled in place: small tensors kept beside large ones that go make holes no large one fits into again
        parts = self.count.new_zeros(2)
        for tile in self.tiles:
            made = logits(tile)
            positive, out = self.relation.relate_valid(tile.images, tile.texts)
            signed = made.where(positive, made.neg())
            cost = F.logsigmoid(signed).neg_()
            if self.smoothing:
                cost.add_(signed, alpha=self.smoothing / 2)
            if out is not None:
                cost.masked_fill_(out, 0.0)
            near = cost.where(positive, 0.0).sum()
            parts[0] += near
            parts[1] += cost.sum() - near
        parts /= self.count
        return parts.sum(), parts

    def slope(self, tile: Tile, logits: Tensor) -> Tensor:
        positive, out = self.relation.relate_valid(tile.images, tile.texts)
        slope = logits.sigmoid_().sub_(positive.to(logits.dtype), alpha=1 - self.smoothing)
        if self.smoothing:
            slope.sub_(self.smoothing / 2)
        if out is not None:
            slope.masked_fill_(out, 0.0)
        return slope / self.count
