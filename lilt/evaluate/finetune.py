"""Fine-tuning as a task: what a tower can learn of a classification when a policy lets it move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilt.evaluate.accuracy import right_ranks
from lilt.evaluate.chosen import Chosen, Learned
from lilt.evaluate.classed import OnClasses
from lilt.evaluate.examples import Collate, Encoded, Pictures
from lilt.evaluate.metrics import class_metrics
from lilt.evaluate.parts import SIDES, Known, Part
from lilt.evaluate.rows import Rows, at_rest, image_rows
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.evaluate.texts import pooled_texts
from lilt.evaluate.tuning import OnPolicy, Tuned, own_stream
from lilt.registry import nearest
from lilt.towers import ImageContract

Look = Callable[[Tuned, str, Part], tuple[Known, Rows | None]]


class Material(NamedTuple):
    """What is learned, as examples; how features are looked at; and the counts that go with it."""

    learned: Learned
    examples: Pictures | Encoded
    collate: Collate
    look: Look
    counts: Callable[[Rows | None], Values]


@register("finetune")
@dataclass(frozen=True)
class Finetune(OnPolicy, Chosen, OnClasses):
    """Train a fresh linear classifier on one tower, with a policy on the tower, and test it.

    side: vision (a folder or manifest as for probe) or text (data as for text_probe). The tower starts as it is in the
    run; a copy is trained, by any policy with its own learning rates or lr. The epoch with the best top-1 on the
    validation split is tested, the earlier of equals.
    Source: Devlin et al. 2019, arXiv 1810.04805, section 4.1; there a pair is one sequence, as with joint=true; without
    it each text goes through the tower by itself.
    """

    augment: str = "none"

    def measure(self, subject: Subject) -> Values:
        self.check_policy("text" if self.side == "text" else "vision")
        if self.side not in SIDES:
            raise ValueError(
                f"finetune: side={self.side}; expected vision or text; choose the tower.{nearest(self.side, SIDES)}"
            )
        learned, examples, collate, look, counts = (
            self._texts(subject) if self.side == "text" else self._pictures(subject)
        )
        drawn = learned.drawn

        def score(model: Tuned) -> float:
            known, _ = look(model, "validation", learned.held)
            return float((right_ranks(logits(model, known), known.labels) == 1).double().mean())

        with own_stream(self.seed, subject.device):
            model, epoch = self.fit(subject, self.side, drawn.classes, examples, collate, score)
            known, rows = look(model, "test", drawn.test)
        yield from class_metrics(logits(model, known), known.labels, drawn.classes)
        yield "best_epoch", epoch
        yield "num_trained", model.count()
        yield from counts(rows)

    def _pictures(self, subject: Subject) -> Material:
        labelled = self.labelled(subject)
        learned = self.learned(subject, labelled)
        contract = subject.core.vision.contract
        assert isinstance(contract, ImageContract)

        def look(model: Tuned, name: str, part: Part) -> tuple[Known, Rows | None]:
            options: dict[str, Any] = {"batch_size": subject.setting.batch_size, "workers": subject.setting.workers}
            with subject.setting.bar(f"finetune: {name}", len(part.items)) as advance, at_rest(model) as device:
                options |= {"advance": advance}
                rows = image_rows(contract, part.items, lambda x, _: model.tower(x).float(), device, **options)
            self.check_any(rows, part.items)
            return Known(rows.rows, part.labels[rows.which]), rows

        def counts(rows: Rows | None) -> Values:
            assert rows is not None
            yield "num_test", len(rows.which)
            yield "num_train", len(learned.train.items)
            yield "num_validation", len(learned.held.items)
            yield from learned.counts()
            yield from self.counts(rows, labelled)

        examples = Pictures(learned.train, contract, self.augment, self.seed)
        return Material(learned, examples, Collate(), look, counts)

    def _texts(self, subject: Subject) -> Material:
        classed = self.classed(subject)
        tokenizer = subject.core.text.contract
        assert not isinstance(tokenizer, ImageContract)
        cut = tokenizer.encode(sorted({text for item in classed.items for text in item}), self.max_tokens)[1]

        def look(model: Tuned, name: str, part: Part) -> tuple[Known, Rows | None]:
            pooled = pooled_texts(model.tower, part.items, subject.setting, self.max_tokens, f"finetune: {name}")
            return Known(pooled.of(part.items), part.labels), None

        def counts(rows: Rows | None) -> Values:
            yield from classed.counts()
            yield "num_cut_texts", cut

        examples = Encoded(classed.learned.train, tokenizer, self.max_tokens)
        return Material(classed.learned, examples, Collate(tokenizer.pad), look, counts)


@torch.no_grad()
def logits(model: Tuned, known: Known) -> Tensor:
    """Return the logits (N, C) of features, on the CPU."""
    return model.head(known.features.to(model.head.weight.device)).cpu()
