"""Losses: pure functions of tensors; they import torch alone. Their catalogue knows the grammar of names too."""

from __future__ import annotations

from lilt.losses.catalogue import Hinge, Loss, Sigmoid, Softmax, build_loss, losses
from lilt.losses.hinge import chunked_hinge, hinge_ranking
from lilt.losses.relation import SAME, Relation
from lilt.losses.sigmoid import chunked_sigmoid, sigmoid_contrastive
from lilt.losses.softmax import chunked_softmax, softmax_contrastive

__all__ = [
    "SAME", "Hinge", "Loss", "Relation", "Sigmoid", "Softmax", "build_loss", "chunked_hinge", "chunked_sigmoid",
    "chunked_softmax", "hinge_ranking", "losses", "sigmoid_contrastive", "softmax_contrastive",
]  # fmt: skip
