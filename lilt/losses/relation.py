"""Which pairs of a joint batch belong together: told by identities, or by matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAME = ("positive", "ignored", "negative")


@dataclass(frozen=True, eq=False)
class Relation:
    """The joint batch by identities: image_id and text_id (G,), valid (G,) is False for padding rows.

    Image i and text j with one image_id or one text_id in common are, as same says, positive, ignored or negative;
    i = j is positive. The relation has no direction, and any block of the (G, G) matrix can be made alone.
    """

    image_id: Tensor
    text_id: Tensor
    valid: Tensor | None = None
    same: str = "positive"

    def __post_init__(self) -> None:
        if self.same not in SAME:
            raise ValueError(f"same={self.same!r}; expected one of {', '.join(SAME)}; choose one")
        shapes = [tuple(t.shape) for t in (self.image_id, self.text_id, self.valid) if t is not None]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(
                f"image_id, text_id and valid have the shapes {shapes}; expected one number per pair of the joint "
                "batch, (G,) each; gather all of them"
            )

    def check(self, total: int) -> None:
        """Raise ValueError where these are not the pairs of so many embeddings."""
        if len(self.image_id) != total:
            raise ValueError(
                f"{len(self.image_id)} identities came with {total} embeddings; expected one per row of the joint "
                "batch; gather both over the same ranks"
            )

    def relate(self, images: slice, texts: slice) -> tuple[Tensor, Tensor | None]:
        """Return which pairs of a block are positive and which are left out for likeness (None: none)."""
        index = torch.arange(len(self.image_id), device=self.image_id.device)
        own = index[images].unsqueeze(1) == index[texts]
        if self.same == "negative":
            return own, None
        alike = self.image_id[images].unsqueeze(1) == self.image_id[texts]
        alike |= self.text_id[images].unsqueeze(1) == self.text_id[texts]
        return (alike, None) if self.same == "positive" else (own, alike & ~own)

    def relate_valid(self, images: slice, texts: slice) -> tuple[Tensor, Tensor | None]:
        """Return the same with all pairs of padding rows left out and none of them positive."""
        positive, out = self.relate(images, texts)
        if self.valid is None:
            return positive, out
        padding = ~(self.valid[images].unsqueeze(1) & self.valid[texts])
        return positive & ~padding, padding if out is None else out | padding


class Part(NamedTuple):
    """What each of our rows is compared with: positives (B, G), out (B, G) neither positive nor negative.

    weight (B,) is 1 for a row that counts and 0 for padding; divisor is what their sum is divided by.
    """

    positives: Tensor
    out: Tensor
    weight: Tensor
    divisor: Tensor


def count_rows(like: Tensor, rows: slice, valid: Tensor | None) -> Tensor:
    """Return our share of the valid rows of the joint batch (G, D), so that the mean over ranks is the joint mean."""
    total = like.new_tensor(len(like)) if valid is None else valid.sum().clamp(min=1).to(like.dtype)
    return total * ((rows.stop - rows.start) / len(like))


def weigh_rows(like: Tensor, rows: slice, valid: Tensor | None) -> Tensor:
    """Return each row's weight (G,) in the mean over our valid rows: zero for padding and for what is not ours."""
    weight = like.new_zeros(len(like))
    weight[rows] = 1 if valid is None else valid[rows].to(like.dtype)
    return weight / count_rows(like, rows, valid)


def take_part(
    like: Tensor, rows: slice, positives: Tensor | None, ignored: Tensor | None, valid: Tensor | None
) -> Part:
    """Settle who is compared with whom in a joint batch of exact embeddings (G, D).

    Raises ValueError when a valid row has no positive; on an accelerator, where the look would cost a wait, the loss
    is NaN instead.
    """
    total, ours, device = len(like), rows.stop - rows.start, like.device
    if positives is None:
        index = torch.arange(total, device=device)
        positives = index[rows].unsqueeze(1) == index
    out = torch.zeros_like(positives) if ignored is None else ignored & ~positives
    real = torch.ones(ours, dtype=torch.bool, device=device) if valid is None else valid[rows]
    if valid is not None:
        # a row that is not real keeps all its columns: a sum over none is -inf, and -inf * 0 is NaN
        out, positives = (out | ~valid) & real.unsqueeze(1), positives & valid
    lonely = real & ~positives.any(1)
    weight = real.to(like.dtype).masked_fill(lonely, math.nan)
    if device.type == "cpu" and weight.isnan().any():
        raise ValueError(
            "a row of the batch has no positive; each valid row needs at least its own pair: check positives"
        )
    return Part(positives, out, weight, count_rows(like, rows, valid))
