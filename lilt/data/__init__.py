"""Data: manifests, transforms, pairs and batches."""

from __future__ import annotations

from lilt.data.collate import Batch, Collate
from lilt.data.dataset import Batches, PairDataset, TokenTable, ignore_signals, open_image, read_image
from lilt.data.manifest import Sample, read_manifest, select
from lilt.data.references import read_references
from lilt.data.transforms import eval_transform, train_transform

__all__ = [
    "Batch", "Batches", "Collate", "PairDataset", "Sample", "TokenTable", "eval_transform", "ignore_signals",
    "open_image", "read_image", "read_manifest", "read_references", "select", "train_transform",
]  # fmt: skip
