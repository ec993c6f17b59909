"""Losses over the matrix of all pairs that keep no part of it: tile by tile, and once more for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lilt.losses.logits import logits

TO_TEXT, TO_IMAGE = 0, 1


@dataclass(frozen=True)
class Tile:
    """A block of the joint matrix, and in which directions its logits count for us."""

    images: slice
    texts: slice
    directions: tuple[int, ...]

    @property
    def sides(self) -> list[tuple[int, slice, int]]:
        """Return each direction with its rows and the dimension that it sums over."""
        return [(d, self.images, 1) if d == TO_TEXT else (d, self.texts, 0) for d in self.directions]

    def first(self, dim: int) -> int:
        """Return the number of the first image (dim 0) or text (dim 1)."""
        return int((self.images if dim == 0 else self.texts).start)


def check_chunk(chunk: int | None) -> None:
    """Raise ValueError for a chunk of nothing."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}; expected at least 1 row at a time; give 1024, or none for the full matrix")


def spans(part: slice, chunk: int) -> list[slice]:
    """Cut a range into pieces; the last may be shorter."""
    check_chunk(chunk)
    return [slice(start, min(start + chunk, part.stop)) for start in range(part.start, part.stop, chunk)]


def strip(total: int, rows: slice, chunk: int) -> list[Tile]:
    """Cover our images against all texts."""
    return [Tile(a, b, (TO_TEXT,)) for a in spans(rows, chunk) for b in spans(slice(0, total), chunk)]


def cross(total: int, rows: slice, chunk: int) -> list[Tile]:
    """Cover our images against all texts and our texts against all images, what is in both once."""
    ours = spans(rows, chunk)
    others = spans(slice(0, rows.start), chunk) + spans(slice(rows.stop, total), chunk)
    both = [Tile(a, b, (TO_TEXT, TO_IMAGE)) for a in ours for b in ours]
    return both + [t for a in ours for b in others for t in (Tile(a, b, (TO_TEXT,)), Tile(b, a, (TO_IMAGE,)))]


class Rule(Protocol):
    """A loss as a sum over tiles; an instance serves one batch and remembers what its gradient needs, O(G)."""

    @property
    def tiles(self) -> Sequence[Tile]:
        """Return the tiles, which cover each logit that counts once."""
        ...

    def value(self, logits: Callable[[Tile], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and its two parts (2,) from fresh logits of each tile."""
        ...

    def slope(self, tile: Tile, logits: Tensor) -> Tensor:
        """Return the derivative of the loss with respect to the logits of a tile, which may be overwritten."""
        ...


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor | None, bias: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(image, text, scale, bias)
        ctx.rule = rule
        loss, parts = rule.value(lambda tile: logits(image[tile.images], text[tile.texts], scale, bias))
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, text, scale, bias = ctx.saved_tensors
        to_image, to_text = torch.zeros_like(image), torch.zeros_like(text)
        to_bias = gradient.new_zeros(())
        with torch.autocast(image.device.type, enabled=False):
            for tile in ctx.rule.tiles:
                ours, theirs = image[tile.images], text[tile.texts]
                slope = ctx.rule.slope(tile, logits(ours, theirs, scale, bias))
                to_image[tile.images].addmm_(slope, theirs)
                to_text[tile.texts].addmm_(slope.T, ours)
                if bias is not None:
                    to_bias += slope.sum()
        # the sum over all logits of slope * cosine, from what is there already
        to_scale = None if scale is None else (gradient * (image * to_image).sum()).reshape(scale.shape)
        bias_gradient = None if bias is None else (gradient * to_bias).reshape(bias.shape)
        factor = gradient if scale is None else gradient * scale
        return to_image.mul_(factor), to_text.mul_(factor), to_scale, bias_gradient, None


def tiled(image: Tensor, text: Tensor, scale: Tensor | None, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return a loss of exact embeddings and its parts (2,); its gradient recomputes the logits and keeps O(G D)."""
    scale, bias = (None if x is None else x.to(image.dtype) for x in (scale, bias))
    loss, parts = _Tiled.apply(image, text, scale, bias, rule)  # type: ignore[no-untyped-call]
    return loss, parts
