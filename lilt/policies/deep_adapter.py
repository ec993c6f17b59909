"""One new transformer layer on top of a tower's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies.attach import Child
from lilt.policies.base import Plan, Policy, register
from lilt.policies.edits import Attach
from lilt.towers.base import Tower


class TopLayer(Child):
    """A pre-norm transformer layer on tokens (B, L, D); both branches end in zeros, so it starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        for last in (self.out, self.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)  # an additive mask must match the query under autocast
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def rescale(self, factor: float) -> None:
        for last in (self.out, self.fc2):
            last.weight.data.mul_(factor)
            last.bias.data.mul_(factor)


@register("deep_adapter")
@dataclass(frozen=True)
class DeepAdapter(Policy):
    """Train one new transformer layer between the last block and whatever follows it (the final norm, the pooling).

    Count: 12 d^2 + 13 d. With `+layernorm` this is DA of the source.
    Source: Khan & Fu 2023, arXiv 2303.11866.
    """

    lr: ClassVar[float] = 1e-3  # chosen on validation, benchmarks/RESULTS.md
    mergeable: ClassVar[bool] = False

    def plan(self, tower: Tower) -> Plan:
        width = tower.anatomy.token_width
        if width is None:
            raise self.nothing(tower, "blocks that give tokens (B, L, D)")
        heads = max(h for h in (width // 64, width // 32, 1) if h and width % h == 0)
        count = 12 * width**2 + 13 * width
        why = f"a new layer of {heads} heads after the last block"
        make = partial(TopLayer, width, heads)
        return Plan((Attach(tower.anatomy.blocks[-1], count, self.name, why, self.lr, "deep_adapter", make, "block"),))
