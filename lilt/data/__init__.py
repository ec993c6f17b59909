"""Data: manifests, shards, transforms, pairs and batches."""

from __future__ import annotations

from lilt.data.collate import Batch, Collate
from lilt.data.dataset import Pair, PairDataset, Pairs, TokenTable
from lilt.data.hub import is_table, read_table
from lilt.data.images import open_image, read_image
from lilt.data.manifest import Sample, read_manifest, select
from lilt.data.order import Batches, Order
from lilt.data.pack import Packed, pack
from lilt.data.references import read_references
from lilt.data.shard_index import index_of
from lilt.data.shard_paths import is_shards, shard_paths
from lilt.data.shards import ShardDataset, ShardSet
from lilt.data.store import Store
from lilt.data.transforms import eval_transform, train_transform
from lilt.data.views import Views, collate_views
from lilt.data.workers import ignore_signals, make_loader

__all__ = [
    "Batch", "Batches", "Collate", "Order", "Packed", "Pair", "PairDataset", "Pairs", "Sample", "ShardDataset",
    "ShardSet", "Store", "TokenTable", "Views", "collate_views", "eval_transform", "ignore_signals", "index_of",
    "is_shards", "is_table", "make_loader", "open_image", "pack", "read_image", "read_manifest", "read_references",
    "read_table", "select", "shard_paths", "train_transform",
]  # fmt: skip
