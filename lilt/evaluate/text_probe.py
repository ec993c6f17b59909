"""The linear probe of the text tower: how much of a classification of texts its features carry in the open."""

from __future__ import annotations

from dataclasses import dataclass

from lilt.evaluate.classed import OnClasses
from lilt.evaluate.metrics import class_metrics
from lilt.evaluate.parts import Known
from lilt.evaluate.probe import FITS, fit_probe
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register


@register("text_probe")
@dataclass(frozen=True)
class TextProbe(OnClasses):
    """Fit a logistic regression on the pooled features of texts, or of pairs of them, and test it.

    data: a folder with SPLIT.tsv, a file with a split column, a manifest of captions, or `hf:…`; GLUE's files are read
    as they are, with test=dev (their test labels are kept back). Of a pair the features are [u, v, |u - v|, u v], or
    with joint=true those of one sequence. The penalty is chosen as in probe. f1 is that of the second of two classes.
    Source: Conneau & Kiela 2018, arXiv 1803.05449 (SentEval); Wang et al. 2018, arXiv 1804.07461 (GLUE).
    """

    def measure(self, subject: Subject) -> Values:
        classed = self.classed(subject)
        pooled = self.pooled(subject, classed.items)
        learn, check, queries = (Known(pooled.of(part.items), part.labels).on(subject.device) for part in classed.parts)
        classes = classed.learned.drawn.classes
        with subject.setting.alone("text_probe: fits", FITS) as advance:
            penalty, classifier = fit_probe(learn, check, classes, advance)
        yield from class_metrics(classifier(queries.features), queries.labels, classes)
        yield "penalty", penalty
        yield from classed.counts()
        yield "num_cut_texts", pooled.cut
