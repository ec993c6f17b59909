"""Joint batches for the losses' tests: unit rows in float64, scalars to learn, and who is related to whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.losses import SAME, Loss, Relation, build_loss

SPECS = (
    "softmax", "softmax(smoothing=0.2)", "sigmoid", "sigmoid(smoothing=0.2)", "hinge(margin=0.5)",
    "hinge(margin=0.5,hardest=true)",
)  # fmt: skip


def unit(seed: int, rows: int, dim: int = 5, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=-1)
    return made.requires_grad_(requires_grad)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@dataclass(frozen=True)
class Joint:
    """A joint batch, with what is learned: both embeddings, scale and bias."""

    image: Tensor
    text: Tensor
    relation: Relation
    scale: Tensor
    bias: Tensor

    def learned(self, loss: Loss) -> list[Tensor]:
        """Return what a loss has a gradient for."""
        scalars = [self.scale] * loss.needs_scale + [self.bias] * loss.needs_bias
        return [self.image, self.text, *scalars]

    def run(self, loss: Loss, rows: slice | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what a loss says; it gets a scale and a bias only where it asks for them."""
        scale = self.scale if loss.needs_scale else None
        bias = self.bias if loss.needs_bias else None
        rows = slice(0, len(self.image)) if rows is None else rows
        return loss(self.image, self.text, scale, bias, rows=rows, relation=self.relation)

    def everything(self, loss: Loss, rows: slice | None = None) -> list[Tensor]:
        """Return value, parts and gradients."""
        value, parts = self.run(loss, rows)
        return [value.detach(), *parts.values(), *torch.autograd.grad(value, self.learned(loss))]


def joint(seed: int, rows: int = 12, same: str | None = None, padded: bool = True) -> Joint:
    """Draw a batch in which some images and captions come several times, and some rows are padding."""
    draw = random.Random(seed)
    numbers = [[draw.randrange(rows) for _ in range(rows)] for _ in range(2)]
    valid = torch.tensor([draw.random() < 0.75 for _ in range(rows)]) if padded else None
    relation = Relation(torch.tensor(numbers[0]), torch.tensor(numbers[1]), valid, same or draw.choice(SAME))
    image, text = unit(2 * seed, rows), unit(2 * seed + 1, rows)
    return Joint(image, text, relation, scalar(draw.uniform(2, 20)), scalar(draw.uniform(-8, 2)))


def chunked(spec: str, chunk: int | None) -> Loss:
    return replace(build_loss(spec), chunk=chunk)


def close(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for mine, other in zip(given, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def related(relation: Relation) -> tuple[list[list[bool]], list[list[bool]], list[bool]]:
    """Say in plain loops which pairs are positive, which take no part, and which rows are real."""
    image, text = relation.image_id.tolist(), relation.text_id.tolist()
    total = len(image)
    real = [True] * total if relation.valid is None else relation.valid.tolist()
    positive, out = ([[False] * total for _ in range(total)] for _ in range(2))
    for i in range(total):
        for j in range(total):
            alike = image[i] == image[j] or text[i] == text[j]
            positive[i][j] = i == j or (alike and relation.same == "positive")
            out[i][j] = not real[j] or (alike and i != j and relation.same == "ignored")
            positive[i][j] = positive[i][j] and real[j]
    return positive, out, real
