"""What a training step of a pair of towers will cost, before any is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lilt.budgets import meta_batch, step_cost
from lilt.budgets.compare import BarePair
from lilt.budgets.cost import fused_kernels
from lilt.budgets.counter import Counter
from lilt.towers import Tower

PROJECTION = "linear(dim=256)"


@dataclass(frozen=True)
class Step:
    """Values that a policy trains, FLOPs of a step, and how many times those of a forward alone that is."""

    trainable: int
    flops: int
    forwards: float


def predict(vision: Tower, text: Tower, policy: str, batch_size: int, text_tokens: int, counter: Counter) -> Step:
    """Predict the step of two towers on the meta device. Raises ValueError where they cannot take the policy."""
    images, tokens = meta_batch(vision, text, batch_size, text_tokens)
    tuned = BarePair(vision, text, PROJECTION, "none", images, tokens, counter).tuned(policy)
    before = counter.flops
    with torch.no_grad(), fused_kernels(), counter:
        tuned(images, tokens)
    forward = counter.flops - before
    flops = step_cost(tuned, images, tokens, counter).flops
    return Step(sum(p.numel() for p in tuned.trained().values()), flops, flops / forward)
