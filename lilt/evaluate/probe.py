"""The linear probe: how much of a classification a tower's features carry in the open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.evaluate.accuracy import accuracy, right_ranks
from lilt.evaluate.chosen import Chosen
from lilt.evaluate.logistic import ROWS_AT_ONCE, Logistic, fit_logistic
from lilt.evaluate.parts import Known
from lilt.evaluate.rows import Advance
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register

PENALTIES = tuple(10.0**power for power in range(1, -6, -1))  # from strong to weak
FITS = len(PENALTIES) + 1  # with the last one, of what was held out too


@register("probe")
@dataclass(frozen=True)
class Probe(Chosen):
    """Fit a multinomial logistic regression on the pooled features of the training images and test it.

    The penalty is the one of ten to the 1, 0, … -5 with the best top-1 on the validation split (by default `val`, or a
    fifth of each class of the training images where there is none), the stronger of equals; then training and
    validation images are fitted together. Nothing is chosen on the test split.
    Source: Radford et al. 2021, arXiv 2103.00020, appendix A.3.
    """

    def measure(self, subject: Subject) -> Values:
        labelled = self.labelled(subject)
        learned = self.learned(subject, labelled)
        drawn = learned.drawn
        learn, _ = self.know(subject, "train", learned.train)
        check, _ = self.know(subject, "validation", learned.held)
        queries, rows = self.know(subject, "test", drawn.test)
        with subject.setting.alone("probe: fits", FITS) as advance:
            penalty, classifier = fit_probe(learn, check, drawn.classes, advance)
        yield from accuracy(ranks(classifier, queries), queries.labels, drawn.classes)
        yield "penalty", penalty
        yield "num_test", len(queries.labels)
        yield "num_train", len(learn.labels)
        yield "num_validation", len(check.labels)
        yield from learned.counts()
        yield from self.counts(rows, labelled)


def fit_probe(
    learn: Known, check: Known, classes: int, advance: Advance = lambda count: None
) -> tuple[float, Logistic]:
    """Choose the penalty on held-out features, then fit them together with the others; return both."""
    penalty, solution = choose_penalty(learn, check, classes, advance)
    features, labels = (torch.cat([mine, held]) for mine, held in zip(learn, check, strict=True))
    fitted = fit_logistic(features, labels, classes, penalty, solution)
    advance(1)
    return penalty, fitted


def choose_penalty(
    learn: Known, check: Known, classes: int, advance: Advance = lambda count: None
) -> tuple[float, Logistic]:
    """Return the penalty that does best on held-out features and its solution; each fit starts from the last one's."""
    best: tuple[float, float, Logistic] | None = None
    solution: Logistic | None = None
    for penalty in PENALTIES:
        solution = fit_logistic(learn.features, learn.labels, classes, penalty, solution)
        right = float((ranks(solution, check) == 1).double().mean())
        if best is None or right > best[0]:
            best = right, penalty, solution
        advance(1)
    assert best is not None
    return best[1], best[2]


def ranks(classifier: Logistic, known: Known) -> Tensor:
    """Return the rank (N,) of the right class of each."""
    parts = zip(known.features.split(ROWS_AT_ONCE), known.labels.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([right_ranks(classifier(features), labels) for features, labels in parts])
