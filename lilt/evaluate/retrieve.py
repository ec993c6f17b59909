"""Retrieval as a task among others, in one language or in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lilt.data import Sample, is_table
from lilt.evaluate.columns import Columns, Told, read_told
from lilt.evaluate.embed import Embedded, distinct, embed_split, flat, recalls
from lilt.evaluate.late import late
from lilt.evaluate.retrieval import Score, cosines
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values, register
from lilt.evaluate.tokens import embed_tokens
from lilt.registry import nearest
from lilt.towers import ImageContract, expand

SCORES = ("cosine", "late")
NO_COLUMNS = Columns()


@register("retrieval")
@dataclass(frozen=True)
class Retrieval(OnData):
    """Find each caption's image and each image's captions: recalls both ways, on the manifest of the run by default.

    score: cosine of the two vectors, or late, token by token (`lilt.evaluate.late`), of a run or an off-the-shelf model
    whose sides pool by one token or the mean, as CLIP's do and SigLIP's do not; that takes a float64 product of all
    tokens of the images with all of the captions, best done on an accelerator.
    columns: `caption_en|caption_de`, recalls for each column of captions by itself, such as one a language; each image
    is encoded once for all, and those without a caption in a column are left out of it and counted. XTD10 as it is
    published is read with data=FOLDER/test_image_names.txt, columns=en|de (`lilt.evaluate.columns`).
    """

    split: str | None = None
    score: str = "cosine"
    columns: Columns = NO_COLUMNS

    def measure(self, subject: Subject) -> Values:
        if self.score not in SCORES:
            known = ", ".join(SCORES)
            raise ValueError(f"retrieval: unknown score {self.score!r}; known: {known}.{nearest(self.score, SCORES)}")
        score: Score = partial(late, device=subject.device) if self.score == "late" else cosines
        if self.columns.names:
            yield from self._by_column(subject, score)
            return
        result = recalls(self._embed(subject, self.read_samples(subject, self.split)), score)
        yield from flat(result)
        self.check_count(result["num_images"], "readable images")

    def _embed(self, subject: Subject, samples: Sequence[Sample]) -> Embedded[Any]:
        embed: Any = embed_tokens if self.score == "late" else embed_split
        setting = subject.setting
        options: dict[str, Any] = {"batch_size": setting.batch_size, "workers": setting.workers}
        options["max_tokens"] = subject.model.config.eval_tokens
        texts = len(distinct(samples))
        with setting.bar("retrieval: images", len(samples)) as see, setting.bar("retrieval: captions", texts) as read:
            return embed(subject.core, samples, advance=see, advance_texts=read, **options)

    def _by_column(self, subject: Subject, score: Score) -> Values:
        told = self._told(subject)
        names = self.columns.names
        # all columns at once: each image is encoded once
        samples = [Sample(t.image, tuple(c for name in names for c in t.captions[name]), "") for t in told]
        whole = self._embed(subject, samples)
        lost = {path for path, _ in whole.faults}
        read = [t for t in told if t.image not in lost]
        column = torch.tensor([at for t in read for at, name in enumerate(names) for _ in t.captions[name]])
        for at, name in enumerate(names):
            part = _part(whole, column == at, _cut(subject, [c for t in read for c in t.captions[name]]))
            for key, value in flat(recalls(part, score)):
                if key != "num_unreadable":  # of all columns
                    yield (
                        (f"num_{name}/{key.removeprefix('num_')}" if key.startswith("num_") else f"{name}/{key}"),
                        value,
                    )
            yield f"num_{name}/uncaptioned", len(read) - len(part.image)
        yield "num_images", len(read)
        yield "num_unreadable", len(told) - len(read)
        self.check_count(len(read), "readable images")

    def _told(self, subject: Subject) -> list[Told]:
        """Return the images of the split with their captions; without splits the whole is one."""
        given, root = self.given(subject)
        source: str | Path = expand(given) if is_table(given) else self.source(subject)[0]
        told = read_told(source, expand(root) if root else None, self.columns.names)
        known = sorted({t.split for t in told if t.split is not None})
        if known:
            wanted = (self.split or subject.setting.split).split("|")
            for part in wanted:
                if part not in known:
                    raise ValueError(
                        f"{given} has no split {part!r}; it has: {', '.join(known)}.{nearest(part, known)}"
                    )
            told = [t for t in told if t.split in wanted]
        self.check_count(len(told), f"images in {given}")
        for name in self.columns.names:
            if not any(t.captions[name] for t in told):
                raise ValueError(
                    f"retrieval: none of {len(told)} images in {given} has a caption in the column {name!r}; expected "
                    "at least one; leave the column out, or name another split"
                )
        return told


def _part(whole: Embedded[Any], mine: torch.Tensor, cut: int) -> Embedded[Any]:
    """Return some of the captions, with the images that have one of them."""
    present, owner = whole.owner[mine].unique(return_inverse=True)
    return Embedded(whole.image[present], whole.text[mine], owner, whole.expected_images, whole.faults, cut)


def _cut(subject: Subject, captions: Sequence[str]) -> int:
    tokenizer = subject.core.text.contract
    assert not isinstance(tokenizer, ImageContract)
    texts = sorted(set(captions))
    return tokenizer.encode(texts, subject.model.config.eval_tokens)[1] if texts else 0
