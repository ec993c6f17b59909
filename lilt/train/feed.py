"""The batches of a training, each in its pieces, prepared ahead by data workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from accelerate import Accelerator

from lilt import distributed
from lilt.config import TrainConfig
from lilt.data import Batch, Batches, Collate, Pairs, make_loader
from lilt.memory import available
from lilt.train.shelf import Shelf

AHEAD_SHARE = 0.25  # of the free memory that pieces prepared ahead may fill
MOST_PIECES = 64  # of a batch: each that waits holds some file descriptors


class Feed:
    """Yields batch after batch without an end, each as its pieces; those of one step are kept on a shelf."""

    def __init__(
        self,
        dataset: Pairs,
        collate: Collate,
        batches: Batches,
        config: TrainConfig,
        accelerator: Accelerator,
        shelf: Shelf,
    ):
        self.batches, self.shelf = batches, shelf
        # the loader is ours: Accelerate's would repeat samples to even out batches, which are false negatives here
        self.loader = make_loader(
            dataset,
            config.workers,
            batch_sampler=batches,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
            prefetch_factor=ahead(batches, config.workers, collate.image_shape) if config.workers else None,
            # without its own generator a loader draws its base seed from the one that dropout uses
            generator=torch.Generator().manual_seed(config.seed),
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        pieces = iter(self.loader)
        while True:
            self.shelf.clear()
            # no name for it here: the batch is gone before the next one is gathered
            yield list(islice(pieces, 1) if self.batches.pieces == 1 else self._kept(pieces))

    def _kept(self, pieces: Iterator[Batch]) -> Iterator[Batch]:
        for piece in islice(pieces, self.batches.pieces):
            # what workers hand over holds a file descriptor for each tensor, and pinning copies it
            ours = piece if self.loader.pin_memory or not self.loader.num_workers else piece.own()
            stored = {name: self.shelf.put(rows, exact=True) for name, rows in ours.stored.items()}
            yield replace(ours, images=self.shelf.put(ours.images, exact=True), stored=stored)


def piece_rows(rows: int, micro_batch: int | None) -> int | None:
    """Return how many rows the loader gives at a time: micro-batches, several of them where they are many."""
    if micro_batch is None:
        return None
    return micro_batch * math.ceil(rows / micro_batch / MOST_PIECES)


def ahead(batches: Batches, workers: int, image_shape: tuple[int, ...]) -> int:
    """Return how many pieces each data worker prepares ahead: the next batch, where memory has place for it."""
    size = 4 * batches.piece * math.prod(image_shape)
    place = AHEAD_SHARE * available() / distributed.local_world_size() / size
    return max(2, min(math.ceil(batches.pieces / workers), int(place / workers)))
