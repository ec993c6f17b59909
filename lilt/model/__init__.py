"""The model between the towers and the loss."""

from __future__ import annotations

from lilt.model.core import Embeddings, Scale, TwoTower
from lilt.model.projection import build_projection, projections

__all__ = ["Embeddings", "Scale", "TwoTower", "build_projection", "projections"]
