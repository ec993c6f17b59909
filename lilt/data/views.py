"""The fixed views of the training images, one by one: what is computed of each is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lilt.data.dataset import PairDataset
from lilt.data.images import Fault


class Seen(NamedTuple):
    """Views (B,) by their number, images (B', 3, H, W) of those that could be read, which those are (B,), faults."""

    rows: Tensor
    images: Tensor
    good: Tensor
    faults: list[Fault]


class Views(Dataset[tuple[int, Tensor | None, Fault | None]]):
    """Some of the views of a dataset that has fixed ones; view v of image i has the number v * images + i."""

    def __init__(self, pairs: PairDataset, rows: Sequence[int]):
        self.pairs, self.rows = pairs, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Fault | None]:
        row = self.rows[index]
        view, image_id = divmod(row, len(self.pairs.paths))
        with torch.random.fork_rng(devices=[]):
            return row, *self.pairs.see(image_id, view)


def collate_views(items: Sequence[tuple[int, Tensor | None, Fault | None]]) -> Seen:
    """Join views to a batch; what could not be read has no image."""
    images = [image for _, image, _ in items if image is not None]
    return Seen(
        torch.tensor([row for row, _, _ in items]),
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([image is not None for _, image, _ in items]),
        [fault for _, _, fault in items if fault is not None],
    )
