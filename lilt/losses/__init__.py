"""Losses: pure functions of tensors; they import torch alone."""

from __future__ import annotations

from lilt.losses.contrastive import softmax_contrastive

__all__ = ["softmax_contrastive"]
