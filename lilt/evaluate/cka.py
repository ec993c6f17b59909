"""Linear CKA: how alike two representations of the same things are, whatever their rotation and scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What linear CKA needs to know of rows x (N, P) and y (N, Q): means, and products of what is left without them."""

    count: int
    means: tuple[Tensor, Tensor]  # (P,) and (Q,)
    products: tuple[Tensor, Tensor, Tensor]  # x'x (P, P), y'y (Q, Q), x'y (P, Q)

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Read some rows of both; sums are in float64 on the CPU."""
        x, y = x.detach().float(), y.detach().float()
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        products = (x.T @ x).cpu().double(), (y.T @ y).cpu().double(), (x.T @ y).cpu().double()
        return cls(len(x), (means[0].cpu().double(), means[1].cpu().double()), products)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the rows of both; so time and memory are linear in the number of rows.

        Source: Chan, Golub & LeVeque 1983, The American Statistician 37(3), equation 2.1.
        """
        count = self.count + other.count
        dx, dy = (theirs - mine for mine, theirs in zip(self.means, other.means, strict=True))
        share = self.count * other.count / count
        between = torch.outer(dx, dx), torch.outer(dy, dy), torch.outer(dx, dy)
        xx, yy, xy = (a + b + share * c for a, b, c in zip(self.products, other.products, between, strict=True))
        weight = other.count / count
        return Moments(count, (self.means[0] + weight * dx, self.means[1] + weight * dy), (xx, yy, xy))

    def cka(self) -> float:
        """Return ||x'y||² / (||x'x|| ||y'y||): 1 for equal up to rotation and scale, 0 for unrelated.

        What does not vary at all is like what does not vary either, and like nothing else.
        Source: Kornblith et al. 2019, arXiv 1905.00414, linear CKA in its feature form.
        """
        xx, yy, xy = self.products
        norms = float(xx.norm()), float(yy.norm())
        if min(norms) == 0:
            return float(max(norms) == 0)
        return float(xy.square().sum()) / (norms[0] * norms[1])
