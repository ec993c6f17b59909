"""Metrics of whole splits beside accuracy: F1, Matthews' correlation, Pearson's and Spearman's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lilt.evaluate.accuracy import accuracy, right_ranks


def class_metrics(scores: Tensor, labels: Tensor, classes: int) -> Iterator[tuple[str, float]]:
    """Yield accuracies, matthews and, of two classes, f1 of the second, in percent, of scores (N, C), labels (N,)."""
    ranks = right_ranks(scores, labels)
    yield from accuracy(ranks, labels, classes)
    found = predicted(scores, labels, ranks)
    if classes == 2:
        yield "f1", 100 * f1(found, labels)
    yield "matthews", 100 * matthews(found, labels, classes)


def predicted(scores: Tensor, labels: Tensor, ranks: Tensor) -> Tensor:
    """Return the class (N,) that each row of scores names: a wrong one where the right one only ties with it."""
    others = scores.nan_to_num(torch.finfo(scores.dtype).min).scatter(1, labels.unsqueeze(1), float("-inf"))
    return torch.where(ranks == 1, labels, others.argmax(1))


def f1(found: Tensor, labels: Tensor, positive: int = 1) -> float:
    """Return the harmonic mean of precision and recall of one class; 0 where it is neither found nor there."""
    right = int(((found == positive) & (labels == positive)).sum())
    named = int((found == positive).sum()) + int((labels == positive).sum())
    return 2 * right / named if named else 0.0


def matthews(found: Tensor, labels: Tensor, classes: int) -> float:
    """Return the correlation of predicted and true classes; 0 where either is always the same.

    Source: Matthews 1975; for more than two classes Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006.
    """
    table = torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes).double()
    total, true, named = table.sum(), table.sum(1), table.sum(0)
    together = table.diagonal().sum() * total - true @ named
    spread = (total**2 - named @ named) * (total**2 - true @ true)
    return float(together / spread.sqrt()) if spread > 0 else 0.0


def score_metrics(found: Tensor, said: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the correlations, in percent, of what was found and what people said (N,)."""
    yield "spearman", 100 * spearman(found, said)
    yield "pearson", 100 * pearson(found, said)


def pearson(x: Tensor, y: Tensor) -> float:
    """Return the linear correlation of x and y (N,) in float64; 0 where either is always the same."""
    if len(x) < 2 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return 0.0
    a, b = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((a / a.norm()) @ (b / b.norm()))


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the correlation of the ranks of x and y (N,); equal values share the mean of their ranks."""
    return pearson(mean_ranks(x), mean_ranks(y))


def mean_ranks(x: Tensor) -> Tensor:
    """Return the rank (N,) of each value from 1, in float64; equal values share the mean of theirs."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
