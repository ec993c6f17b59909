"""Mutual nearest neighbours: how much two towers agree on which things are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**22  # numbers in memory at a time
TIED = 1e-12  # cosines summed in float64 that differ less are equal
CANDIDATES = 4  # times k: as many of the nearest are looked at to find ties


@dataclass(frozen=True)
class Neighbours:
    """Of N things the indices (N, W) of the k nearest others of each, and how surely (N, W) each is one of them.

    Nearest is by cosine. Several that are equally near, with place for some of them, share the places: the weight is
    the chance to be drawn among them. lost (N,) are things with so many equally near that they say nothing.
    """

    k: int
    which: Tensor
    weight: Tensor
    lost: Tensor

    @property
    def chance(self) -> float:
        """The share of neighbours that two things without relation have in common."""
        return self.k / (len(self.which) - 1)

    @classmethod
    def of(cls, rows: Tensor, k: int) -> Neighbours:
        """Find the neighbours of rows (N, W); time grows with N², memory with N: a few rows are compared at a time."""
        count = len(rows)
        if not 1 <= k < count - 1:
            raise ValueError(
                f"k={k} neighbours among {count} things: expected at least 1, and at least {k + 2} things, or "
                "everything is a neighbour; give more pairs, or another k"
            )
        unit = F.normalize(rows.double(), dim=-1)
        wide = min(CANDIDATES * k, count - 1)
        parts = []
        for start in range(0, count, step := max(1, AT_ONCE // count)):
            cosines = unit[start : start + step] @ unit.T
            own = torch.arange(len(cosines))
            cosines[own, start + own] = -torch.inf
            near = cosines.topk(wide)
            parts.append((near.indices, *_weights(near.values, k)))
        which, weight, edge = (torch.cat(column) for column in zip(*parts, strict=True))
        # where the last candidate is tied too there may be more, and nobody knows how many
        lost = edge if wide < count - 1 else torch.zeros_like(edge)
        weight = weight.masked_fill(lost.unsqueeze(1), 0)
        used = max(k, int((weight > 0).any(0).sum()))
        return cls(k, which[:, :used].clone(), weight[:, :used].clone(), lost)


def _weights(nearest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the weights of cosines (B, W), largest first, and of which rows the last is as near as the k-th."""
    edge = nearest[:, k - 1 : k]
    nearer = (nearest > edge + TIED).double()
    tied = ((nearest - edge).abs() <= TIED).double()
    free = k - nearer.sum(1, keepdim=True)
    return nearer + tied * free / tied.sum(1, keepdim=True), tied[:, -1].bool()


def mutual(x: Neighbours, y: Neighbours) -> float:
    """Return the mean share, in percent, of the k nearest of each thing that two towers have in common.

    With ties it is the share expected when each tower draws among its equals on its own: they are no agreement. A thing
    that is lost to one of them counts as chance. Source: Huh et al. 2024, arXiv 2405.07987, mutual k-nearest-neighbour
    metric; without their cut of large activations, which depends on the axes.
    """
    assert (x.k, len(x.which)) == (y.k, len(y.which))
    shares = []
    for rows in torch.arange(len(x.which)).split(max(1, AT_ONCE // (x.which.shape[1] * y.which.shape[1]))):
        same = x.which[rows].unsqueeze(2) == y.which[rows].unsqueeze(1)
        both = x.weight[rows].unsqueeze(2) * y.weight[rows].unsqueeze(1)
        shares.append((both * same).sum((1, 2)) / x.k)
    share = torch.cat(shares)
    share[x.lost | y.lost] = x.chance
    return 100 * float(share.mean())
