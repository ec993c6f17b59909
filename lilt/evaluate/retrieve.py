"""Retrieval as a task among others."""

from __future__ import annotations

from dataclasses import dataclass

from lilt.evaluate.embed import evaluate_retrieval, flat
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values, register


@register("retrieval")
@dataclass(frozen=True)
class Retrieval(OnData):
    """Find each caption's image and each image's captions: recalls both ways, on the manifest of the run by default."""

    split: str | None = None

    def measure(self, subject: Subject) -> Values:
        samples = self.read_samples(subject, self.split)
        setting, config = subject.setting, subject.model.config
        with setting.bar("retrieval", len(samples)) as advance:
            result = evaluate_retrieval(
                subject.core,
                samples,
                batch_size=setting.batch_size,
                max_tokens=config.eval_tokens,
                workers=setting.workers,
                advance=advance,
            )
        yield from flat(result)
        self.check_count(result["num_images"], "readable images")
