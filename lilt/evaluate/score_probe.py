"""The linear probe for scores: how much of what people say of texts in numbers the text tower carries in the open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.evaluate.chosen import HELD, part_lines
from lilt.evaluate.classed import joined
from lilt.evaluate.metrics import pearson, spearman
from lilt.evaluate.parts import Known, Part, some_of
from lilt.evaluate.probe import FITS, PENALTIES
from lilt.evaluate.rows import Advance
from lilt.evaluate.sentences import Read, read_sentences, scores_of
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.evaluate.texts import OnTexts


@register("score_probe")
@dataclass(frozen=True)
class ScoreProbe(OnTexts):
    """Fit a ridge regression from the pooled features of texts, or of pairs of them, to scores; correlate on the test
    split: Pearson and Spearman, in percent.

    data and the features of a pair: as for text_probe; STS-B's files are read as they are, with test=dev. score: the
    column of the scores. The penalty is the one of ten to the 1, 0, … -5 with the best Spearman on the validation split
    (by default `val`, or a fifth of the training lines), the stronger of equals; then both are fitted together.
    Source: Hoerl & Kennard 1970, doi 10.1080/00401706.1970.10488634; Cer et al. 2017, arXiv 1708.00055 (STS benchmark).
    """

    score: str | None = None
    joint: bool = False
    max_texts: int | None = None  # of each part, drawn at random, always the same
    train: str = "train"
    test: str | None = None
    val: str | None = None

    def measure(self, subject: Subject) -> Values:
        where, test = self.where(subject), self.test or subject.setting.split
        said = scores_of(self.score)
        lines = part_lines(self.name, where, (self.train, test), self.val)
        read = {
            name: read_sentences(some, f"{where} split {name}", self.text, self.pair, said)
            for name, some in lines.items()
        }
        train, queries, *more = (self._part(found, f"{where} split {name}") for name, found in read.items())
        self.check_count(len(queries.items), "texts with a score to test on")
        untested = [part.without(queries) for part in (train, *more)]
        learn, check = self._apart(*untested)
        pooled = self.pooled(subject, [item for part in (learn, check, queries) for item in part.items])
        parts = (learn, check, queries)
        learned, checked, asked = (Known(pooled.of(p.items), p.labels).on(subject.device) for p in parts)
        with subject.setting.alone(f"{self.name}: fits", FITS) as advance:
            penalty, line = choose_ridge(learned, checked, advance)
        found = line(asked.features).cpu()
        yield "spearman", 100 * spearman(found, queries.labels)
        yield "pearson", 100 * pearson(found, queries.labels)
        yield "penalty", penalty
        for name, part in zip(("train", "validation", "test"), parts, strict=True):
            yield f"num_{name}", len(part.items)
        yield "num_also_in_test", sum(len(p.items) for p in (train, *more)) - sum(len(p.items) for p in untested)
        yield "num_unscored", sum(part.silent for part in read.values())
        yield "num_malformed", sum(part.malformed for part in read.values())
        yield "num_cut_texts", pooled.cut

    def _part(self, read: Read, where: str) -> Part:
        some = [read.sentences[i] for i in some_of(len(read.sentences), self.max_texts)]
        said = torch.tensor([one.said for one in some], dtype=torch.double)
        if len(said.unique()) < 2:
            raise ValueError(
                f"{self.name}: {where} has {len(said.unique())} different scores on {len(said)} lines; expected scores "
                "that differ; name another column with score=…, or a split that has them (GLUE keeps those of its test "
                "split back: use test=dev)"
            )
        return Part([joined(one, self.name) if self.joint else one.texts for one in some], said)

    def _apart(self, train: Part, held: Part | None = None) -> tuple[Part, Part]:
        """Return what is learned from and what is chosen by, a fifth unless it is there; nothing is in both."""
        check = _fifth(train) if held is None else held
        learn = train.without(check)
        if len(learn.items) < 2 or len(check.items) < 2:
            raise ValueError(
                f"{self.name}: {len(learn.items)} lines are left to learn from and {len(check.items)} to choose by, "
                "without those that are tested; expected two or more of each; give more, or name other splits"
            )
        return learn, check


@dataclass(frozen=True)
class Ridge:
    """A linear map on standardised features to one number: weight (W,), bias, and the mean and spread (W,) of each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return numbers (N,)."""
        return (features.to(self.mean) - self.mean) / self.spread @ self.weight + self.bias


def fit_ridge(features: Tensor, said: Tensor, penalty: float) -> Ridge:
    """Minimise mean squared error + penalty * |weight|^2 over features (N, W) with numbers (N,), in float64.

    Features are standardised by their own mean and spread, as for the probe of classes; the bias is not penalised.
    """
    x, y = features.double(), said.double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-9 * spread.max().clamp(min=1e-300), spread, torch.ones_like(spread))
    x = (x - mean) / spread
    moments = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    together = (x.T @ (y - y.mean()) / len(x)).unsqueeze(1)
    weight = torch.cholesky_solve(together, torch.linalg.cholesky(moments)).squeeze(1)
    return Ridge(weight, y.mean(), mean, spread)


def choose_ridge(learn: Known, check: Known, advance: Advance = lambda count: None) -> tuple[float, Ridge]:
    """Choose the penalty by Spearman on held-out features, then fit them together with the others; return both."""
    best = -2.0, 0.0
    for penalty in PENALTIES:
        found = spearman(fit_ridge(learn.features, learn.labels, penalty)(check.features), check.labels)
        best = (found, penalty) if found > best[0] else best
        advance(1)
    features, said = (torch.cat([mine, held]) for mine, held in zip(learn, check, strict=True))
    fitted = fit_ridge(features, said, best[1])
    advance(1)
    return best[1], fitted


def _fifth(part: Part) -> Part:
    order = torch.randperm(len(part.items), generator=torch.Generator().manual_seed(0))
    some = sorted(order[: round(HELD * len(order))].tolist())
    return Part([part.items[i] for i in some], part.labels[some])
