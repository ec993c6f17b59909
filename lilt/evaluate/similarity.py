"""Similarity: whether the text tower finds those texts alike that people do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lilt.evaluate.lines import read_lines
from lilt.evaluate.metrics import score_metrics
from lilt.evaluate.sentences import read_sentences, scores_of
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.evaluate.texts import OnTexts


@register("similarity")
@dataclass(frozen=True)
class Similarity(OnTexts):
    """Correlate the cosines of the pooled features of two texts with scores: Pearson and Spearman, in percent.

    data: as for text_probe; STS-B's files are read as they are, with split=dev. score: the column of the scores.
    Source: Cer et al. 2017, arXiv 1708.00055 (STS benchmark).
    """

    split: str | None = None
    score: str | None = None

    def measure(self, subject: Subject) -> Values:
        where, split = self.where(subject), self.split or subject.setting.split
        lines = read_lines(where, [split])[split]
        read = read_sentences(lines, f"{where} split {split}", self.text, self.pair, scores_of(self.score))
        said = torch.tensor([one.said for one in read.sentences], dtype=torch.double)
        self._check(str(where), [one.texts for one in read.sentences], said)
        pooled = self.pooled(subject, (one.texts for one in read.sentences))
        # summed in float64 and then rounded, so that pairs of equal texts tie exactly
        rows = F.normalize(pooled.rows.double(), dim=-1)
        places = torch.tensor([[pooled.number[text] for text in one.texts] for one in read.sentences])
        cosines = (rows[places[:, 0]] * rows[places[:, 1]]).sum(1).float()
        yield from score_metrics(cosines, said)
        yield "num_pairs", len(said)
        yield "num_unscored", read.silent
        yield "num_malformed", read.malformed
        yield "num_cut_texts", pooled.cut

    def _check(self, where: str, texts: list[tuple[str, ...]], said: torch.Tensor) -> None:
        if texts and len(texts[0]) != 2:
            raise ValueError(
                f"similarity: {where} has single texts; expected two a line, such as sentence1 and sentence2; name "
                "their columns with text=… and pair=…"
            )
        if len(said) < 2 or bool((said == said[0]).all()):
            raise ValueError(
                f"similarity: {where} has {len(said.unique())} different scores on {len(said)} pairs; expected scores "
                "that differ; name another column with score=…, or a split that has them (GLUE keeps those of its test "
                "split back: use split=dev)"
            )
        self.check_count(len(said), "pairs with a score")
