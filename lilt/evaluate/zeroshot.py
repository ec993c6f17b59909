"""Zero-shot classification: the class whose prompts lie nearest to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.evaluate.accuracy import accuracy, right_ranks
from lilt.evaluate.parts import OnLabels
from lilt.evaluate.retrieval import cosines
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.evaluate.words import SINGLE, fill, match_names, read_classes, read_templates

PROMPTS_AT_ONCE = 8192


@register("zeroshot")
@dataclass(frozen=True)
class ZeroShot(OnLabels):
    """Name each image by the class whose prompts, averaged on the unit sphere, are nearest: top-1, top-5, per class.

    classes: `imagenet` or a file; by default the labels themselves. templates: `openai80`, one with {}, or a file.
    Classes of one name tie, and ties count against the model.
    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4.
    """

    split: str | None = None
    classes: str | None = None
    templates: str = SINGLE

    def measure(self, subject: Subject) -> Values:
        templates, names = read_templates(self.templates), read_classes(self.classes)
        labelled = self.labelled(subject)
        names, number = match_names(labelled.entries, names, labelled.source)
        part = self.part(labelled.split(self.split or subject.setting.split, only=True), number)
        self.check_count(len(part.items), "labelled images")
        weights, cut = class_rows(subject, names, templates)
        labels, weights = part.labels, weights.to(subject.device)

        def rank(images: Tensor, index: Tensor) -> Tensor:
            scores = cosines(subject.core.encode_image(images), weights)
            return right_ranks(scores, labels.to(scores.device)[index])

        rows = subject.see("zero-shot", part.items, rank)
        self.check_any(rows, part.items)
        yield from accuracy(rows.rows, labels[rows.which], len(names))
        yield "num_images", len(rows.which)
        yield "num_classes", len(names)
        yield "num_templates", len(templates)
        yield "num_cut_prompts", cut
        yield from self.counts(rows, labelled)


def class_rows(subject: Subject, names: Sequence[str], templates: Sequence[str]) -> tuple[Tensor, int]:
    """Return the unit row (C, D) of each class, the mean of its prompts' unit rows, and how many prompts were cut."""
    rows, cut = [], 0
    step = max(1, PROMPTS_AT_ONCE // len(templates))
    for start in range(0, len(names), step):
        some = names[start : start + step]
        prompts = [fill(template, name) for name in some for template in templates]
        said = f"zero-shot: prompts of {start + len(some)} of {len(names)} classes"
        embedded, shortened = subject.read(said, prompts, subject.core.encode_text)
        rows.append(F.normalize(embedded.view(len(some), len(templates), -1).mean(1), dim=-1))
        cut += shortened
    return torch.cat(rows), cut
