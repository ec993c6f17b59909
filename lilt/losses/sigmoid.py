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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of our images with all texts, summed over texts and averaged over valid images.

    A row costs -sum_j log sigmoid(z_j (scale * cosine_j + bias)), z_j = 1 for its positives and -1 for the others;
    ignored pairs and padding are left out. Arguments are those of `softmax_contrastive`, with a scalar bias; the
    texts' side needs no second direction, for the sum over all ranks holds each pair once.
    Source: Zhai et al. 2023, arXiv 2303.15343, algorithm 1; learned scale from 10 and bias from -10.
    """
    image, text = exact(image), exact(text)
    part = take_part(image, rows, positives, ignored, valid)
    made = logits(image[rows], text, scale, bias)
    cost = -F.logsigmoid(made.where(part.positives, -made)).masked_fill(part.out, 0.0) * part.weight.unsqueeze(1)
    loss, near = cost.sum() / part.divisor, cost.detach().where(part.positives, 0.0).sum() / part.divisor
    return loss, {"positive": near, "negative": loss.detach() - near}


def chunked_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, rows: slice, relation: Relation, chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient from at most chunk x chunk logits at a time.

    Memory: O(chunk^2 + G D). The backward pass computes the logits again.
    """
    image, text = exact(image), exact(text)
    loss, parts = tiled(image, text, scale, bias, _Sigmoid(image, rows, relation, chunk))
    return loss, {"positive": parts[0], "negative": parts[1]}


class _Sigmoid:
    """Each pair stands alone, so there is nothing to remember."""

    def __init__(self, image: Tensor, rows: slice, relation: Relation, chunk: int):
        relation.check(len(image))
        self.relation = relation
        self.tiles = strip(len(image), rows, chunk)
        self.count = count_rows(image, rows, relation.valid)

    def value(self, logits: Callable[[Tile], Tensor]) -> tuple[Tensor, Tensor]:
        # filled in place: small tensors kept beside large ones that go make holes no large one fits into again
        parts = self.count.new_zeros(2)
        for tile in self.tiles:
            made = logits(tile)
            positive, out = self.relation.relate_valid(tile.images, tile.texts)
            cost = F.logsigmoid(made.where(positive, made.neg())).neg_()
            if out is not None:
                cost.masked_fill_(out, 0.0)
            near = cost.where(positive, 0.0).sum()
            parts[0] += near
            parts[1] += cost.sum() - near
        parts /= self.count
        return parts.sum(), parts

    def slope(self, tile: Tile, logits: Tensor) -> Tensor:
        positive, out = self.relation.relate_valid(tile.images, tile.texts)
        slope = logits.sigmoid_().sub_(positive.to(logits.dtype))
        if out is not None:
            slope.masked_fill_(out, 0.0)
        return slope / self.count
