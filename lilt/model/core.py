"""Two towers, a projection and a scale: images and captions in, unit embeddings out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tower


class Embeddings(NamedTuple):
    """Unit embeddings image (B, D) and text (B, D), and the scale > 0 their cosines are multiplied with."""

    image: Tensor
    text: Tensor
    scale: Tensor


class Scale(nn.Module):
    """A learned positive factor exp(t); t is kept in its range after each step."""

    def __init__(self, start: float = 1 / 0.07, low: float = 1.0, high: float = 100.0):
        super().__init__()
        if not 0 < low <= start <= high:
            raise ValueError(
                f"scale starts at {start} outside [{low}, {high}]; give 0 < scale_min <= scale <= scale_max"
            )
        self.low, self.high = math.log(low), math.log(high)
        self.log = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring t back into its range; to be called after each optimizer step, so that its gradient never dies."""
        self.log.clamp_(self.low, self.high)


class TwoTower(nn.Module):
    """The trainable whole. A locked tower stays in eval mode, and so do all stored normalisation statistics."""

    def __init__(self, vision: Tower, text: Tower, projection: nn.Module, scale: Scale):
        super().__init__()
        self.vision = vision
        self.text = text
        self.projection: Any = projection
        self.scale = scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as unit rows (B, D)."""
        return F.normalize(self.projection.project_vision(self.vision(images)).float(), dim=-1)

    def encode_text(self, tokens: Inputs) -> Tensor:
        """Embed token tensors (B, L) as unit rows (B, D)."""
        return F.normalize(self.projection.project_text(self.text(tokens)).float(), dim=-1)

    def forward(self, images: Tensor, tokens: Inputs) -> Embeddings:
        return Embeddings(self.encode_image(images), self.encode_text(tokens), self.scale())

    def train(self, mode: bool = True) -> TwoTower:
        """Set the mode; dropout of a locked tower stays off and batch statistics stay as pretrained."""
        super().train(mode)
        for tower in (self.vision, self.text):
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
            for module in tower.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
