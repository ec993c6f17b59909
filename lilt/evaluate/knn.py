"""The k nearest neighbours: what a tower's features say of classes before anything is learned from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.evaluate.accuracy import accuracy, right_ranks
from lilt.evaluate.parts import Known, Trained
from lilt.evaluate.retrieval import cosines
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register

SCORES_AT_ONCE = 2**25


@register("knn")
@dataclass(frozen=True)
class Knn(Trained):
    """Let the k most similar training images vote on the class of each test image, by exp(cosine / temperature).

    Of several classes with equal votes the right one comes last; a class without a training image is never found.
    Source: Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294 (DINO).
    """

    k: int = 20
    temperature: float = 0.07

    def measure(self, subject: Subject) -> Values:
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(f"knn(k={self.k},temperature={self.temperature:g}); expected both above 0; leave them out")
        labelled = self.labelled(subject)
        drawn = self.draw(subject, labelled)
        bank, _ = self.know(subject, "train", drawn.train)
        if len(bank.features) < self.k:
            raise ValueError(
                f"knn: the split {self.train!r} of {labelled.source} has {len(bank.features)} images, expected at "
                f"least k={self.k}; give more, or a smaller k"
            )
        queries, rows = self.know(subject, "test", drawn.test)
        ranks = neighbour_ranks(bank, queries, drawn.classes, self.k, self.temperature)
        yield from accuracy(ranks, queries.labels, drawn.classes)
        yield "num_test", len(queries.labels)
        yield "num_train", len(bank.labels)
        yield "num_classes", drawn.classes
        yield "num_also_in_test", drawn.also_in_test
        yield from self.counts(rows, labelled)


def neighbour_ranks(
    bank: Known, queries: Known, classes: int, k: int, temperature: float, chunk: int | None = None
) -> Tensor:
    """Return the rank (Q,) of the right class by the votes of the k nearest; chunk queries are compared at a time."""
    # the whole matrix of similarities is never there
    chunk = chunk or max(1, SCORES_AT_ONCE // len(bank.labels))
    known = F.normalize(bank.features.double(), dim=-1)
    ranks = torch.empty_like(queries.labels)
    for start in range(0, len(queries.labels), chunk):
        asked = F.normalize(queries.features[start : start + chunk].double(), dim=-1)
        nearest = cosines(asked, known).topk(k)
        # measured from the nearest: a small temperature would make the power infinite
        closeness = (nearest.values - nearest.values[:, :1]).double()
        votes = torch.zeros(len(asked), classes, dtype=torch.double, device=known.device)
        votes.scatter_add_(1, bank.labels[nearest.indices], (closeness / temperature).exp())
        ranks[start : start + chunk] = right_ranks(votes, queries.labels[start : start + chunk])
    return ranks
