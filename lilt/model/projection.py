"""The shared projection: one component, the same for every policy, that takes both towers into the joint space."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lilt.registry import Registry, construct, parse_call

projections: Registry[type[nn.Module]] = Registry("projection")


@projections.register("linear")
class Linear(nn.Module):
    """One linear map per tower, or with tied=true one map for both behind a bridge from the narrower width.

    (B, vision_dim), (B, text_dim) -> (B, D) each, not yet normalised.
    """

    def __init__(self, vision_dim: int, text_dim: int, dim: int = 256, tied: bool = False):
        super().__init__()
        self.dim = dim
        self.tied = tied
        if not tied:
            self.vision: nn.Module = nn.Linear(vision_dim, dim)
            self.text: nn.Module = nn.Linear(text_dim, dim)
            return
        wide = max(vision_dim, text_dim)
        self.shared = nn.Linear(wide, dim)
        self.vision = nn.Linear(vision_dim, wide) if vision_dim < wide else nn.Identity()
        self.text = nn.Linear(text_dim, wide) if text_dim < wide else nn.Identity()

    def project_vision(self, features: Tensor) -> Tensor:
        """Take vision features to the joint space."""
        out = self.vision(features)
        return self.shared(out) if self.tied else out

    def project_text(self, features: Tensor) -> Tensor:
        """Take text features to the joint space."""
        out = self.text(features)
        return self.shared(out) if self.tied else out


def build_projection(spec: str, vision_dim: int, text_dim: int) -> nn.Module:
    """Build a projection from `linear(dim=256,tied=true)`."""
    call = parse_call(spec)
    cls = projections[call.name]
    given = ("vision_dim", "text_dim")
    signature = inspect.signature(cls.__init__, eval_str=True).parameters
    fields: dict[str, Any] = {k: p.annotation for k, p in signature.items() if k not in ("self", *given)}
    return construct(lambda **options: cls(vision_dim, text_dim, **options), call, fields)
