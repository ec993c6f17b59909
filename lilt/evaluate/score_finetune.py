"""Fine-tuning for scores: what the text tower can learn of what people say of texts in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.evaluate.examples import Collate, Encoded
from lilt.evaluate.metrics import score_metrics, spearman
from lilt.evaluate.parts import Part
from lilt.evaluate.scored import OnScores
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values, register
from lilt.evaluate.texts import pooled_texts
from lilt.evaluate.tuning import OnPolicy, Tuned, own_stream
from lilt.towers import ImageContract


@register("score_finetune")
@dataclass(frozen=True)
class ScoreFinetune(OnPolicy, OnScores):
    """Train a fresh linear layer to scores on the text tower, with a policy on the tower; correlate on the test split.

    data, score and the splits: as for score_probe; the policy and its options: as for finetune. The loss is the mean
    squared error from scores with mean 0 and spread 1 in training; the epoch with the best Spearman on the validation
    split is tested, the earlier of equals.
    Source: Devlin et al. 2019, arXiv 1810.04805, section 4.1 (STS-B); Cer et al. 2017, arXiv 1708.00055.
    """

    def measure(self, subject: Subject) -> Values:
        self.check_policy("text")
        scored = self.scored(subject)
        tokenizer = subject.core.text.contract
        assert not isinstance(tokenizer, ImageContract)
        cut = tokenizer.encode(sorted({text for item in scored.items for text in item}), self.max_tokens)[1]

        def look(model: Tuned, name: str, part: Part) -> Tensor:
            name = f"{self.name}: {name}"
            pooled = pooled_texts(model.tower, part.items, subject.setting, self.max_tokens, name)
            with torch.no_grad():
                found: Tensor = model.head(pooled.of(part.items).to(subject.device)).squeeze(1).cpu()
            return found

        def score(model: Tuned) -> float:
            return spearman(look(model, "validation", scored.check), scored.check.labels)

        examples = Encoded(standardised(scored.learn), tokenizer, self.max_tokens)
        with own_stream(self.seed, subject.device):
            model, epoch = self.fit(subject, "text", 1, examples, Collate(tokenizer.pad), score, squared)
            found = look(model, "test", scored.test)
        yield from score_metrics(found, scored.test.labels)
        yield "best_epoch", epoch
        yield "num_trained", model.count()
        yield from scored.counts()
        yield "num_cut_texts", cut


def standardised(part: Part) -> Part:
    """Return a part whose scores have mean 0 and spread 1, so that learning rates do not depend on their scale."""
    return Part(part.items, (part.labels - part.labels.mean()) / part.labels.std(correction=0))


def squared(found: Tensor, said: Tensor) -> Tensor:
    """Return the mean squared error of outputs (B, 1) from numbers (B,)."""
    return F.mse_loss(found.squeeze(1), said.to(found))
