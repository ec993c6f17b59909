"""What a block is called with besides its tokens, made to fit when new tokens stand among them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilt.policies.attach import TORCH_MASKS

HIDDEN = -1e3  # what adds less to a score hides the token; position biases are smaller than that


@dataclass(frozen=True)
class Gap:
    """Where new tokens stand: n of them, before the token at of the length that were there, prefix without content."""

    at: int
    n: int
    length: int
    prefix: int = 0


def splice(x: Tensor, new: Tensor, at: int, dim: int) -> Tensor:
    """Put new in before the index at of an axis."""
    return torch.cat([x.narrow(dim, 0, at), new, x.narrow(dim, at, x.shape[dim] - at)], dim)


def cut(x: Tensor, at: int, n: int, dim: int) -> Tensor:
    """Take n out again, from the index at of an axis."""
    return torch.cat([x.narrow(dim, 0, at), x.narrow(dim, at + n, x.shape[dim] - at - n)], dim)


def names_of(module: nn.Module, args: tuple) -> list[str]:
    """Name the positional arguments of a call; those that the signature leaves open by their number."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    return [known[i] if i < len(known) else str(i) for i in range(len(args))]


def lengthen(given: dict[str, Any], gap: Gap) -> dict[str, Any]:
    """Return a block's arguments by name with masks, position biases and rotations that have room for new tokens.

    Masks show them to every token, a position bias is zero there, a rotation leaves them as they are. What already has
    the new length stays, and so does what is not known: a block that cannot use it then says so itself.
    """
    return {key: _longer(key, value, gap) for key, value in given.items()}


def _longer(key: str, value: Any, gap: Gap) -> Any:
    if key == "position_embeddings" and isinstance(value, tuple) and len(value) == 2:  # transformers
        both = all(isinstance(part, Tensor) and part.is_floating_point() for part in value)
        return _still(*value, gap) if both else value
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if key == "rope" and value.is_floating_point():  # timm: both in one
        sin, cos = value.chunk(2, -1)
        return torch.cat(_still(cos, sin, gap)[::-1], -1)
    if value.shape[-1] != gap.length:
        return value
    if "mask" in key:
        return _mask(key, value, gap)
    if ("bias" in key or "rel_pos" in key) and value.shape[-2] == gap.length:
        return _insert(_insert(value, 0.0, gap, -1), 0.0, gap, -2)
    return value


def _insert(x: Tensor, value: float, gap: Gap, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = gap.n
    return splice(x, x.new_full(shape, value), gap.at, dim)


def _still(cos: Tensor, sin: Tensor, gap: Gap) -> tuple[Tensor, Tensor]:
    """Insert rows (..., L, D) that rotate by nothing; tables may be for the tokens behind the prefix alone."""
    if cos.shape[-2] not in (gap.length, gap.length - gap.prefix):
        return cos, sin
    at = gap.at - (gap.length - cos.shape[-2])
    size = torch.hypot(cos, sin)[..., :1, :]  # 1, or what a model scales its rotations with
    size = size.expand(*size.shape[:-2], gap.n, -1)
    return splice(cos, size, at, -2), splice(sin, torch.zeros_like(size), at, -2)


def _mask(key: str, mask: Tensor, gap: Gap) -> Tensor:
    if mask.dtype == torch.bool and ("padding" in key or (key in TORCH_MASKS and mask.ndim < 4)):
        return ~_kept(key, ~mask, gap)  # torch's own layers: True is hidden
    return _kept(key, mask, gap)


def _kept(key: str, mask: Tensor, gap: Gap) -> Tensor:
    """Lengthen a mask that adds to the scores (0: kept) or that is 1 where a token is kept."""
    if mask.ndim == 2 and "padding" in key:
        return _insert(mask, float(mask.dtype == torch.bool), gap, -1)
    square = mask.ndim > 2 or (mask.shape[0] == gap.length and (mask.is_floating_point() or key in TORCH_MASKS))
    if not square:
        return _insert(mask, 1.0, gap, -1)
    wide = _insert(mask, float(not mask.is_floating_point()), gap, -1)
    if mask.shape[-2] != mask.shape[-1]:  # one row for all queries
        return wide
    seen = mask > HIDDEN if mask.is_floating_point() else mask.bool()
    # the new tokens read what any token reads, or in a tower that never looks ahead only those new ones before them
    ahead = seen.triu(1).flatten(-2).any(-1)[..., None, None]
    real = (seen.any(-2, keepdim=True) & ahead).expand(*seen.shape[:-2], gap.n, -1)
    among = ahead | torch.ones(gap.n, gap.n, dtype=torch.bool, device=mask.device).tril()
    rows = splice(real, among, gap.at, -1)
    if mask.is_floating_point():
        rows = torch.zeros_like(rows, dtype=mask.dtype).masked_fill(~rows, torch.finfo(mask.dtype).min)
    return splice(wide, rows.to(mask.dtype), gap.at, -2)
