"""What tasks on texts share: where the texts are, and what the text tower makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilt.data import is_table
from lilt.evaluate.rows import at_rest, text_rows
from lilt.evaluate.subject import Setting, Subject
from lilt.evaluate.task import OnData
from lilt.towers import ImageContract, Text, Tower, expand

Texts = tuple[Text, ...]  # one, or the two of a pair, or two that are read as one


class Pooled(NamedTuple):
    """The pooled features (N, W) of texts, the number of each, and how many were cut."""

    rows: Tensor
    number: dict[Text, int]
    cut: int

    def of(self, items: Iterable[Texts]) -> Tensor:
        """Return a row for each text; for a pair u and v the row [u, v, |u - v|, u v] of four times the width.

        Source: Conneau et al. 2017, arXiv 1705.02364, section 3; SentEval (arXiv 1803.05449) has it for SNLI.
        """
        columns = list(zip(*items, strict=True))
        rows = [self.rows[torch.tensor([self.number[text] for text in column])] for column in columns]
        return rows[0] if len(rows) == 1 else join_pair(*rows)


def join_pair(u: Tensor, v: Tensor) -> Tensor:
    """Return [u, v, |u - v|, u v] (N, 4 W) of features (N, W)."""
    return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)


@dataclass(frozen=True)
class OnTexts(OnData):
    """A task on texts: files as GLUE has them, a manifest, or a dataset `hf:…`; pair names the second of two texts."""

    text: str | None = None
    pair: str | None = None
    max_tokens: int | None = None  # default: the context of the text tower

    def where(self, subject: Subject) -> str | Path:
        """Return the file, the folder or the dataset."""
        given, _ = self.given(subject)
        return expand(given) if is_table(given) else self.source(subject)[0]

    def pooled(self, subject: Subject, items: Iterable[Texts]) -> Pooled:
        """Return the pooled features of texts, each encoded once."""
        return pooled_texts(subject.core.text, items, subject.setting, self.max_tokens, f"{self.name}: texts")


def pooled_texts(tower: Tower, items: Iterable[Texts], setting: Setting, max_tokens: int | None, name: str) -> Pooled:
    """Return the pooled features that a tower gives for texts, each encoded once; name is shown beside a bar."""
    texts = sorted({text for item in items for text in item})
    assert not isinstance(tower.contract, ImageContract)
    options: dict[str, Any] = {"batch_size": setting.batch_size, "max_tokens": max_tokens}
    with setting.bar(name, len(texts)) as advance, at_rest(tower) as device:
        options |= {"advance": advance}
        rows, cut = text_rows(tower.contract, texts, lambda tokens: tower(tokens).float(), device, **options)
    return Pooled(rows, {text: i for i, text in enumerate(texts)}, cut)
