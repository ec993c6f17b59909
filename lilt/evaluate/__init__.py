"""Evaluation: what a model finds, counted honestly."""

from __future__ import annotations

from lilt.evaluate.embed import Embedded, embed_split, evaluate_retrieval, flat
from lilt.evaluate.retrieval import retrieval

__all__ = ["Embedded", "embed_split", "evaluate_retrieval", "flat", "retrieval"]
