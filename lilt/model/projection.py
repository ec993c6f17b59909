"""Heads: what takes both towers into the joint space, one component and the same for every policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lilt.model.components import build_component
from lilt.registry import Registry
from lilt.towers.base import Encoded, pool_tokens


class Projection(nn.Module):
    """One map per tower, or with tied one for both behind a bridge from the narrower width; make: width -> a map.

    (B, vision_dim), (B, text_dim) -> (B, dim) each, not yet normalised.
    """

    reads_tokens: ClassVar[bool] = False

    def __init__(self, vision_dim: int, text_dim: int, dim: int, tied: bool, make: Callable[[int], nn.Module]):
        super().__init__()
        self.dim = dim
        self.tied = tied
        if not tied:
            self.vision = make(vision_dim)
            self.text = make(text_dim)
            return
        wide = max(vision_dim, text_dim)
        self.shared = make(wide)
        self.vision = nn.Linear(vision_dim, wide) if vision_dim < wide else nn.Identity()
        self.text = nn.Linear(text_dim, wide) if text_dim < wide else nn.Identity()

    def through(self, features: Tensor, side: str) -> Tensor:
        """Take features (…, W) of one side through its map."""
        out: Tensor = self.vision(features) if side == "vision" else self.text(features)
        return self.shared(out) if self.tied else out

    def project(self, encoded: Encoded, side: str) -> Tensor:
        """Take what became of one side to the joint space."""
        return self.through(encoded.pooled, side)

    def project_tokens(self, encoded: Encoded, side: str) -> Tensor:
        """Take each token of one side to the joint space by itself, (B, L, dim)."""
        assert encoded.tokens is not None
        return self.through(encoded.tokens.features, side)

    def project_vision(self, encoded: Encoded) -> Tensor:
        """Take images to the joint space."""
        return self.project(encoded, "vision")

    def project_text(self, encoded: Encoded) -> Tensor:
        """Take captions to the joint space."""
        return self.project(encoded, "text")


projections: Registry[type[Projection]] = Registry("projection")


@projections.register("linear")
class Linear(Projection):
    """A linear map."""

    def __init__(self, vision_dim: int, text_dim: int, dim: int = 256, tied: bool = False):
        super().__init__(vision_dim, text_dim, dim, tied, lambda width: nn.Linear(width, dim))


@projections.register("mlp")
class Mlp(Projection):
    """Two layers with a GELU between them; hidden is by default four times the width below."""

    def __init__(self, vision_dim: int, text_dim: int, dim: int = 256, hidden: int | None = None, tied: bool = False):
        def make(width: int) -> nn.Module:
            between = 4 * width if hidden is None else hidden
            return nn.Sequential(nn.Linear(width, between), nn.GELU(), nn.Linear(between, dim))

        super().__init__(vision_dim, text_dim, dim, tied, make)


class GatedUnit(nn.Module):
    """out(relu6(gate(x)) * value(x)) of a normalised x, with a hidden layer expansion times the width."""

    def __init__(self, width: int, expansion: int, dim: int):
        super().__init__()
        # a product of two maps grows with the square of its input, and towers differ in the length of theirs
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, expansion * width)
        self.value = nn.Linear(width, expansion * width)
        self.out = nn.Linear(expansion * width, dim)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features)
        return self.out(F.relu6(self.gate(x)) * self.value(x))


@projections.register("glu")
class Glu(Projection):
    """A gated linear unit.

    Count per tower: 2 expansion W (W + 1) + (expansion W + 1) dim + 2 W.
    Source: Zhang et al. 2024, arXiv 2412.04616 (SAIL).
    """

    def __init__(self, vision_dim: int, text_dim: int, dim: int = 256, expansion: int = 8, tied: bool = False):
        super().__init__(vision_dim, text_dim, dim, tied, lambda width: GatedUnit(width, expansion, dim))


class TokenMap(nn.Module):
    """A linear map plus two layers with a GELU, of a normalised token.

    A linear map alone would do nothing that pool=cls+mean does not: the mean of its outputs is its output for the mean.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, dim)
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features)
        return self.linear(x) + self.mlp(x)


@projections.register("tokens")
class TokenMean(Projection):
    """A linear map of the pooled features plus the mean of mapped patches or words; padding and prefix stay out.

    Source: Maniparambil et al. 2024, arXiv 2409.19425 (FreezeAlign).
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vision_tokens: int,
        text_tokens: int,
        dim: int = 256,
        tied: bool = False,
    ):
        super().__init__(vision_dim, text_dim, dim, tied, lambda width: nn.Linear(width, dim))
        self.tokens = Projection(vision_tokens, text_tokens, dim, tied, lambda width: TokenMap(width, dim))

    def project(self, encoded: Encoded, side: str) -> Tensor:
        assert encoded.tokens is not None
        mapped = encoded.tokens._replace(features=self.tokens.through(encoded.tokens.features, side))
        return self.through(encoded.pooled, side) + pool_tokens(mapped, "mean")

    def project_tokens(self, encoded: Encoded, side: str) -> Tensor:
        assert encoded.tokens is not None
        # so that the mean of them is what `project` gives
        return self.through(encoded.pooled, side).unsqueeze(1) + self.tokens.through(encoded.tokens.features, side)


@projections.register("none")
class Nothing(Projection):
    """No map: the features below are the joint vectors."""

    def __init__(self, vision_dim: int, text_dim: int):
        if vision_dim != text_dim:
            raise ValueError(
                f"projection=none keeps widths as they are, and they are {vision_dim} (vision) and {text_dim} (text); "
                "expected one width; use linear(dim=256), or a shared encoder, which bridges them"
            )
        super().__init__(vision_dim, text_dim, vision_dim, False, lambda width: nn.Identity())


def build_projection(
    spec: str, vision_dim: int, text_dim: int, vision_tokens: int | None = None, text_tokens: int | None = None
) -> Projection:
    """Build a projection from `linear(dim=256,tied=true)`; tokens are as wide as the pooled features if not said."""
    return build_component(
        projections,
        spec,
        vision_dim=vision_dim,
        text_dim=text_dim,
        vision_tokens=vision_tokens or vision_dim,
        text_tokens=text_tokens or text_dim,
    )
