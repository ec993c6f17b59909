"""Two towers, what both go through, a projection and a scale: images and captions in, unit embeddings out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.model.shared import Nothing
from lilt.towers.base import Encoded, Inputs, Tower


class Embeddings(NamedTuple):
    """Unit embeddings image (B, D) and text (B, D), and the scale > 0 their cosines are multiplied with.

    features: both before they were brought to unit length, which is what distillation reads. hidden: unit rows (B, H)
    of both at the second contrastive point, where the shared encoder has one. bias: what a loss adds to its logits. All
    in fp32.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    features: tuple[Tensor, Tensor] | None = None
    hidden: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


class Scale(nn.Module):
    """A learned positive factor exp(t); t is kept in its range after each step."""

    def __init__(self, start: float = 1 / 0.07, low: float = 1.0, high: float = 100.0, learned: bool = True):
        super().__init__()
        if not 0 < low <= start <= high:
            raise ValueError(
                f"scale starts at {start} outside [{low}, {high}]; give 0 < scale_min <= scale <= scale_max"
            )
        self.low, self.high = math.log(low), math.log(high)
        self.log = nn.Parameter(torch.tensor(math.log(start)), requires_grad=learned)

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring t back into its range; to be called after each optimizer step, so that its gradient never dies."""
        self.log.clamp_(self.low, self.high)


class TwoTower(nn.Module):
    """The trainable whole. A locked tower stays in eval mode, and so do all stored normalisation statistics."""

    def __init__(
        self,
        vision: Tower,
        text: Tower,
        projection: nn.Module,
        scale: Scale,
        shared: nn.Module | None = None,
        bias: float | None = None,
    ):
        """bias: where the one that a loss adds to its logits starts; None: there is none."""
        super().__init__()
        self.vision = vision
        self.text = text
        self.projection: Any = projection
        self.scale = scale
        self.shared: Any = Nothing() if shared is None else shared
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as unit rows (B, D)."""
        return _unit(self.projection.project_vision(self._behind(self.vision, images)))

    def encode_text(self, tokens: Inputs) -> Tensor:
        """Embed token tensors (B, L) as unit rows (B, D)."""
        return _unit(self.projection.project_text(self._behind(self.text, tokens)))

    def forward(self, images: Tensor, tokens: Inputs) -> Embeddings:
        image, text = self._behind(self.vision, images), self._behind(self.text, tokens)
        joint = self.projection.project_vision(image).float(), self.projection.project_text(text).float()
        hidden = None if image.hidden is None or text.hidden is None else (_unit(image.hidden), _unit(text.hidden))
        # a copy: engines hang hooks on what a forward gives, and on the parameter itself they would pile up
        bias = None if self.bias is None else self.bias.clone()
        return Embeddings(_unit(joint[0]), _unit(joint[1]), self.scale(), joint, hidden, bias)

    def _behind(self, tower: Tower, inputs: Inputs) -> Encoded:
        """Return what the projection is given; tokens are kept only where somebody reads them."""
        reads = self.shared.reads_tokens or self.projection.reads_tokens
        encoded: Encoded = tower.encode(inputs, tokens=True) if reads else Encoded(tower(inputs))
        return self.shared(encoded, tower.side)

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


def _unit(rows: Tensor) -> Tensor:
    """Bring rows to unit length, in fp32 whatever the precision before."""
    return F.normalize(rows.float(), dim=-1)
