"""What is compared of a layer, and the comparison of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.advise.neighbours import Neighbours, mutual
from lilt.evaluate.cka import Moments


@dataclass(frozen=True)
class View:
    """How one layer sees N things: the neighbours of each, and features (N, W) without their mean for CKA."""

    name: str
    neighbours: Neighbours
    mean: Tensor
    centred: Tensor
    products: Tensor  # centred' centred (W, W)

    @classmethod
    def of(cls, name: str, rows: Tensor, k: int) -> View:
        """Look at features (N, W). Raises ValueError where some are not numbers."""
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).any(1).sum())
            raise ValueError(
                f"the features of {name} are not finite for {bad} of {len(rows)} things; expected numbers; check the "
                "weights, or leave this tower out"
            )
        mean = rows.double().mean(0)
        centred = (rows.double() - mean).float()
        return cls(name, Neighbours.of(rows, k), mean, centred, (centred.T @ centred).double())


@dataclass(frozen=True)
class Match:
    """How alike two layers see the same pairs: mutual neighbours in percent, linear CKA, and the CKA of chance."""

    vision_layer: str
    text_layer: str
    mutual_knn: float
    cka: float
    cka_chance: float


def match(vision: View, text: View) -> Match:
    """Compare two layers; time and memory of CKA are linear in the pairs."""
    cross = (vision.centred.T @ text.centred).double()
    moments = Moments(len(text.centred), (vision.mean, text.mean), (vision.products, text.products, cross))
    knn = mutual(vision.neighbours, text.neighbours)
    return Match(vision.name, text.name, knn, moments.cka(), chance_cka(moments))


def chance_cka(moments: Moments) -> float:
    """Return the mean CKA over all ways to pair the same rows.

    It is far from 0 where rows are few for their width. For centred K and L = P L P' the mean of tr(K P L P') over
    permutations P is tr(K) tr(L) / (N - 1).
    """
    xx, yy, _ = moments.products
    norms = float(xx.norm()), float(yy.norm())
    if min(norms) == 0:
        return moments.cka()
    return float(torch.trace(xx) * torch.trace(yy)) / ((moments.count - 1) * norms[0] * norms[1])
