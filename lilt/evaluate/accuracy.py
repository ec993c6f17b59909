"""How often the right class comes out on top; ties and scores that are no numbers count against the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TOP = 5


def right_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Return the rank (B,) of the right class (B,) among scores (B, C): 1 + how many others score at least as high."""
    own = scores.gather(1, right.unsqueeze(1))
    # the right one is among those that do not score lower; put this way round, NaN counts against the model
    return (~(scores < own)).sum(1)


def accuracy(ranks: Tensor, labels: Tensor, classes: int) -> Iterator[tuple[str, float]]:
    """Yield top1, top5 (where there are more than 5 classes) and mean_per_class in percent, of ranks and labels (N,).

    mean_per_class is the mean over the classes that occur of the share of each that is found first, known as balanced
    accuracy.
    """
    first = (ranks == 1).double()
    yield "top1", 100 * float(first.mean())
    if classes > TOP:
        yield f"top{TOP}", 100 * float((ranks <= TOP).double().mean())
    occurring = torch.bincount(labels, minlength=classes)
    found = torch.bincount(labels, weights=first, minlength=classes)[occurring > 0]
    yield "mean_per_class", 100 * float((found / occurring[occurring > 0]).mean())
