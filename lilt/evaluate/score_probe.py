"""The linear probe for scores: how much of what people say of texts in numbers the text tower carries in the open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.evaluate.metrics import score_metrics, spearman
from lilt.evaluate.parts import Known
from lilt.evaluate.probe import FITS, PENALTIES
from lilt.evaluate.rows import Advance
from lilt.evaluate.scored import OnScores
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register


@register("score_probe")
@dataclass(frozen=True)
class ScoreProbe(OnScores):
    """Fit a ridge regression from the pooled features of texts, or of pairs of them, to scores; correlate on the test
    split: Pearson and Spearman, in percent.

    data and the features of a pair: as for text_probe; STS-B's files are read as they are, with test=dev. score: the
    column of the scores. The penalty is the one of ten to the 1, 0, … -5 with the best Spearman on the validation split
    (by default `val`, or a fifth of the training lines), the stronger of equals; then both are fitted together.
    Source: Hoerl & Kennard 1970, doi 10.1080/00401706.1970.10488634; Cer et al. 2017, arXiv 1708.00055 (STS benchmark).
    """

    def measure(self, subject: Subject) -> Values:
        scored = self.scored(subject)
        pooled = self.pooled(subject, scored.items)
        learn, check, test = (Known(pooled.of(p.items), p.labels).on(subject.device) for p in scored[:3])
        with subject.setting.alone(f"{self.name}: fits", FITS) as advance:
            penalty, line = choose_ridge(learn, check, advance)
        yield from score_metrics(line(test.features).cpu(), scored.test.labels)
        yield "penalty", penalty
        yield from scored.counts()
        yield "num_cut_texts", pooled.cut


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
