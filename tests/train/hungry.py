"""A vision tower that asks for more memory than there is when it is given more than so many images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilt.towers import ImageContract


@dataclass
class Appetite:
    """Fits so many rows, in training; where it does not: on the way there or back; and how often it did not."""

    fits: int = 10**9
    where: str = "forward"
    error: str = "device"  # or host
    refusals: list[int] = field(default_factory=list)

    def ask(self, rows: int) -> None:
        if rows <= self.fits:
            return
        self.refusals.append(rows)
        if self.error == "device":
            raise torch.OutOfMemoryError(f"out of memory: tried to allocate {rows} GiB.\nand so on")
        torch.empty(1 << 60)  # the allocator's own error


APPETITE = Appetite()


class _Taste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        APPETITE.ask(ctx.rows)
        return gradient


class Block(nn.Module):
    """Its gradient comes in two parts, before and behind the place where memory may end."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and APPETITE.where == "forward":
            APPETITE.ask(len(x))
        hidden: Tensor = torch.relu(self.first(self.norm(x)))
        if self.training and APPETITE.where == "backward" and torch.is_grad_enabled():
            hidden = _Taste.apply(hidden)  # type: ignore[no-untyped-call]
        out: Tensor = x + self.drop(self.second(hidden))
        return out


class Hungry(nn.Module):
    """(B, 3, 16, 16) -> (B, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.blocks = nn.ModuleList(Block(24) for _ in range(2))
        self.norm = nn.LayerNorm(24)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x).mean(1)
        return out


def vision() -> tuple[nn.Module, ImageContract]:
    """Return it with fixed weights and how it wants its images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Hungry(), ImageContract(image_px=16)
