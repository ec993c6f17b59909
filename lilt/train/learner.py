"""What is trained: the model, and what only training needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType

from torch import Tensor, nn

from lilt.model import TwoTower
from lilt.towers.front import Front
from lilt.train.distill import Distiller

Outputs = dict[str, Tensor]  # of a forward pass: rows (B, …), and numbers without dimension


class Learner(nn.Module):
    """What is trained: the model, and beside it the distillation head, which only training needs."""

    def __init__(self, core: TwoTower, distiller: Distiller | None = None, fronts: Mapping[str, Front] | None = None):
        super().__init__()
        self.core = core
        self.distiller = distiller
        self.fronts = fronts or {}

    def forward(
        self, images: Tensor, tokens: dict[str, Tensor], stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Outputs:
        """Encode pairs; stored: what the front of a tower gave, by its side, from where that tower then begins."""
        with ExitStack() as stack:
            for side, rows in stored.items():
                stack.enter_context(self.fronts[side].resumed(rows))
            if "vision" in stored and self.fronts["vision"].blind:
                images = self.fronts["vision"].blank(stored["vision"])
            made = self.core(images, tokens)
        out = {"image": made.image, "text": made.text}
        if self.core.scale.log.requires_grad:  # else the loss has no use for it
            out["scale"] = made.scale
        if made.bias is not None:
            out["bias"] = made.bias
        if made.hidden is not None:
            out["image_hidden"], out["text_hidden"] = made.hidden
        if self.distiller is not None:
            assert made.features is not None
            out["image_student"], out["text_student"] = self.distiller(*made.features)
            if self.distiller.scale is not None:
                out["student_scale"] = self.distiller.scale()
        return out

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name: those of the model, then those that only training needs."""
        beside = {} if self.distiller is None else dict(self.distiller.named_parameters(prefix="distiller"))
        return self.core.trained() | beside

    def clamp_(self) -> None:
        """Bring all learned factors back into their ranges."""
        self.core.scale.clamp_()
        if self.distiller is not None:
            self.distiller.clamp_()
