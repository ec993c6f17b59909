"""Shared encoders: what both modalities go through, each by itself, between the towers and the projection."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.model.components import build_component
from lilt.registry import Registry, nearest
from lilt.towers.base import Encoded, Tokens, pool_tokens
from lilt.towers.block import pre_norm_block

POOLS = ("cls", "mean")
POINTS = (1, 2)


class SharedEncoder(nn.Module):
    """What is the same for both modalities; always trained in full. width: of its output, None: as below."""

    reads_tokens: ClassVar[bool] = False
    width: int | None = None

    def forward(self, encoded: Encoded, side: str) -> Encoded:
        raise NotImplementedError


class Bridged(SharedEncoder):
    """A shared encoder of the wider tower's width: the narrower one comes in over a linear map.

    types: with an embedding of the modality, added to every token behind the towers; its LayerScale of 1e-5 lets the
    start be as without. points: where the contrastive loss looks; 2 is at the output and at a hidden layer.
    """

    def __init__(self, vision_dim: int, text_dim: int, types: bool, points: int):
        super().__init__()
        if points not in POINTS:
            raise ValueError(f"shared: points={points}; expected 1 (the output) or 2 (a hidden layer too); give one")
        self.width: int = max(vision_dim, text_dim)
        self.points = points
        self.vision = nn.Linear(vision_dim, self.width) if vision_dim < self.width else nn.Identity()
        self.text = nn.Linear(text_dim, self.width) if text_dim < self.width else nn.Identity()
        self.types = nn.Parameter(0.02 * torch.randn(2, self.width)) if types else None
        self.types_scale = nn.Parameter(torch.full((self.width,), 1e-5)) if types else None

    def enter(self, features: Tensor, side: str) -> Tensor:
        """Bring features (…, W) of one side to the shared width and say which side they are of."""
        x: Tensor = self.vision(features) if side == "vision" else self.text(features)
        if self.types is None or self.types_scale is None:
            return x
        return x + self.types_scale * self.types[0 if side == "vision" else 1]


shared_encoders: Registry[type[SharedEncoder]] = Registry("shared encoder")


@shared_encoders.register("none")
class Nothing(SharedEncoder):
    """No shared encoder."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, encoded: Encoded, side: str) -> Encoded:
        return encoded


@shared_encoders.register("mlp")
class Mlp(Bridged):
    """Three layers on the pooled features, W -> mlp_ratio W -> W -> W: GELU and LayerNorm, then LayerNorm between them.

    The second contrastive point is the output of the middle layer. Tokens, where the projection reads them, go the same
    way one by one.
    Source: Aytar et al. 2017, arXiv 1706.00932, with the layers of Cares' LiteITR; there the third ends in classes.
    """

    def __init__(self, vision_dim: int, text_dim: int, mlp_ratio: float = 4.0, types: bool = False, points: int = 1):
        super().__init__(vision_dim, text_dim, types, points)
        wide = int(mlp_ratio * self.width)
        self.fc1, self.norm1 = nn.Linear(self.width, wide), nn.LayerNorm(wide)
        self.fc2, self.norm2 = nn.Linear(wide, self.width), nn.LayerNorm(self.width)
        self.fc3 = nn.Linear(self.width, self.width)

    def forward(self, encoded: Encoded, side: str) -> Encoded:
        pooled, middle = self._layers(self.enter(encoded.pooled, side))
        tokens = encoded.tokens
        if tokens is not None:
            tokens = tokens._replace(features=self._layers(self.enter(tokens.features, side))[0])
        return Encoded(pooled, tokens, middle if self.points == 2 else None)

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.fc2(self.norm1(F.gelu(self.fc1(x))))
        return self.fc3(self.norm2(middle)), middle


@shared_encoders.register("transformer")
class Transformer(Bridged):
    """n pre-norm blocks with LayerScale on the tokens of a tower; behind them its class token is read, or the mean.

    heads: by default one per 64 of the width, 12 at 768. The second contrastive point is the hidden layer of the last
    MLP before its activation, at the class token or in the mean.
    Count: n (12 W^2 + 15 W) at mlp_ratio 4, and the bridge.
    Source: Cares, LiteITR: one block, no norm behind it, the same in both modalities.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        n: int = 1,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        init_scale: float = 0.2,
        types: bool = False,
        pool: str = "cls",
        points: int = 1,
    ):
        super().__init__(vision_dim, text_dim, types, points)
        if pool not in POOLS:
            raise ValueError(f"shared: unknown pool {pool!r}; known: {', '.join(POOLS)}.{nearest(pool, POOLS)}")
        if n < 1 or init_scale <= 0:
            raise ValueError(
                f"shared: n={n}, init_scale={init_scale:g}; expected at least one block and a scale above 0; "
                "give n=1,init_scale=0.2, or shared=none"
            )
        divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
        if heads is None:
            heads = max(h for h in divisors if h <= max(1, self.width // 64))
        if heads not in divisors:
            raise ValueError(
                f"shared: heads={heads} does not divide the width {self.width}; expected one of "
                f"{', '.join(map(str, divisors))}; give one, or leave it out"
            )
        self.pool = pool
        self.blocks = nn.ModuleList(pre_norm_block(self.width, heads, mlp_ratio, init_scale) for _ in range(n))

    def forward(self, encoded: Encoded, side: str) -> Encoded:
        assert encoded.tokens is not None
        features, mask, prefix = encoded.tokens
        x = self.enter(features, side)
        seen = None if mask is None else mask[:, None, None, :]
        hidden = None
        for block in self.blocks[: len(self.blocks) + 1 - self.points]:
            x = block(x, attn_mask=seen)
        if self.points == 2:
            x, wide = _with_hidden(self.blocks[-1], x, seen)
            hidden = pool_tokens(Tokens(wide, mask, prefix), self.pool)
        tokens = Tokens(x, mask, prefix)
        return Encoded(pool_tokens(tokens, self.pool), tokens, hidden)


def _with_hidden(block: Any, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a block part by part and return the hidden layer of its MLP too."""
    x = x + block.ls1(block.attn(block.norm1(x), attn_mask=seen))
    hidden = block.mlp.fc1(block.norm2(x))
    return x + block.ls2(block.mlp.fc2(block.mlp.act(hidden))), hidden


def build_shared(spec: str, vision_dim: int, text_dim: int) -> SharedEncoder:
    """Build a shared encoder from `transformer(n=1)`; the widths are those of what it reads, tokens or pooled."""
    return build_component(shared_encoders, spec, vision_dim=vision_dim, text_dim=text_dim)
