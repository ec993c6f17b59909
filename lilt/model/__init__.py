"""The model between the towers and the loss."""

from __future__ import annotations

from lilt.model.core import Embeddings, Scale, TwoTower
from lilt.model.heads import build_heads
from lilt.model.projection import build_projection, projections
from lilt.model.shared import build_shared, shared_encoders
from lilt.model.teacher import Teacher, build_teacher

__all__ = [
    "Embeddings", "Scale", "Teacher", "TwoTower", "build_heads", "build_projection", "build_shared", "build_teacher",
    "projections", "shared_encoders",
]  # fmt: skip
