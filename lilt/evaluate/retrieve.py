"""Retrieval as a task among others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lilt.evaluate.embed import embed_split, flat, recalls
from lilt.evaluate.late import late
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values, register
from lilt.evaluate.tokens import embed_tokens
from lilt.registry import nearest

SCORES = ("cosine", "late")


@register("retrieval")
@dataclass(frozen=True)
class Retrieval(OnData):
    """Find each caption's image and each image's captions: recalls both ways, on the manifest of the run by default.

    score: cosine of the two vectors, or late, token by token (`lilt.evaluate.late`); that takes a float64 product of
    all tokens of the images with all of the captions, best done on an accelerator.
    """

    split: str | None = None
    score: str = "cosine"

    def measure(self, subject: Subject) -> Values:
        if self.score not in SCORES:
            known = ", ".join(SCORES)
            raise ValueError(f"retrieval: unknown score {self.score!r}; known: {known}.{nearest(self.score, SCORES)}")
        samples = self.read_samples(subject, self.split)
        setting, config = subject.setting, subject.model.config
        options: dict[str, Any] = {"batch_size": setting.batch_size, "workers": setting.workers}
        with setting.bar("retrieval", len(samples)) as advance:
            options |= {"max_tokens": config.eval_tokens, "advance": advance}
            if self.score == "late":
                result = recalls(embed_tokens(subject.core, samples, **options), partial(late, device=subject.device))
            else:
                result = recalls(embed_split(subject.core, samples, **options))
        yield from flat(result)
        self.check_count(result["num_images"], "readable images")
