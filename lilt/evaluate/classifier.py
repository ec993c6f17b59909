"""What the vision tower still knows: its own features read by the classifier it was pretrained with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lilt.evaluate.accuracy import accuracy, right_ranks
from lilt.evaluate.labelled import check_range
from lilt.evaluate.parts import OnLabels
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.towers import build_classifier
from lilt.towers.original import original_logits, prove_fit


@register("classifier")
@dataclass(frozen=True)
class OriginalClassifier(OnLabels):
    """Classify with the last layer of the model that the tower is from, on the tower's features as they are now.

    model: its spec, by default that of the tower. Labels are numbers of its classes. It is first proved that without
    the policy the two together are that model.
    """

    split: str | None = None
    model: str | None = None

    def measure(self, subject: Subject) -> Values:
        tower = subject.core.vision
        if self.model is None and tower.spec.startswith("module:"):
            raise ValueError(
                f"classifier: the vision tower was passed as a module ({tower.spec}); expected the spec of a model "
                "with its classifier; give model=timm:…"
            )
        classifier = build_classifier(self.model or tower.spec, subject.model.config.image_px).to(subject.device)
        with subject.at_base():
            prove_fit(classifier, tower)
        labelled = self.labelled(subject)
        entries = labelled.split(self.split or subject.setting.split, only=True)
        check_range(entries, classifier.dim, "the classifier")
        part = self.part(entries, {entry.label: int(entry.label) for entry in entries})
        self.check_count(len(part.items), "labelled images")
        labels = part.labels

        def rank(images: Tensor, index: Tensor) -> Tensor:
            logits = original_logits(classifier, tower, images)
            return right_ranks(logits, labels.to(logits.device)[index])

        rows = subject.see("original classifier", part.items, rank)
        self.check_any(rows, part.items)
        yield from accuracy(rows.rows, labels[rows.which], classifier.dim)
        yield "num_images", len(rows.which)
        yield "num_classes", classifier.dim
        yield from self.counts(rows, labelled)
