"""The memory bank: teacher outputs of earlier batches, as further candidates of the contrastive target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lilt.losses.distill import Memory


class Bank(nn.Module):
    """First in, first out: the last K teacher rows (K, W) and whose images they are.

    It is read only once it is full: the published loss has a fixed number of candidates, and a bank in use while it
    fills would change the loss, and with it a learned temperature, at each step. Until then nothing stands in: no
    random rows. It may be filled before the first step by pushing what the teacher says of other images.

    Feed it with gathered rows: it then holds the same on every rank, whatever their number. It works without a wait for
    the device; only the properties wait.
    """

    rows: Tensor
    image_id: Tensor
    pushed: Tensor  # rows since the beginning: tells where the next one goes and how many are there

    def __init__(self, capacity: int, width: int, batch_size: int, pairs: int | None = None):
        """batch_size: rows of a gathered batch; pairs: those that the whole run shows, None if it is filled before.

        Raises ValueError for a bank that is smaller than the batch, or that the run would never fill.
        """
        super().__init__()
        if capacity < batch_size:
            raise ValueError(
                f"a bank of {capacity} rows is smaller than the batch of {batch_size}; expected at least one batch; "
                f"give bank={batch_size} or more, or bank=0 for none"
            )
        if pairs is not None and capacity + batch_size > pairs:
            fits = f"bank={pairs - batch_size} or less, " if pairs >= 2 * batch_size else ""
            raise ValueError(
                f"a bank of {capacity} rows is used once it is full, and the run shows {pairs} pairs in batches of "
                f"{batch_size}; expected a bank that the run fills before its end; give {fits}bank=0 for none, or "
                "train longer"
            )
        self.register_buffer("rows", torch.zeros(capacity, width))
        self.register_buffer("image_id", torch.full((capacity,), -1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    @property
    def capacity(self) -> int:
        """Return how many rows it can hold."""
        return len(self.rows)

    @property
    def filled(self) -> int:
        """Return how many rows it holds."""
        return min(int(self.pushed), self.capacity)

    @property
    def pointer(self) -> int:
        """Return the place of the next row; in a full bank the oldest is there."""
        return int(self.pushed) % self.capacity

    @property
    def full(self) -> bool:
        """Say whether it is in use."""
        return self.filled == self.capacity

    @property
    def bytes(self) -> int:
        """Return its memory, the same from the first step on: 4 W + 8 bytes a row."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def read(self) -> Memory:
        """Return all rows as candidates where it is full, else none."""
        return Memory(self.rows, self.image_id, torch.where(self.pushed >= self.capacity, self.capacity, 0))

    @torch.no_grad()
    def push(self, rows: Tensor, image_id: Tensor, valid: Tensor | None = None) -> None:
        """Let the valid rows of a gathered batch (G, W) take the place of the oldest.

        After the backward pass: before it, the loss still needs the rows that go.
        """
        if len(rows) > self.capacity or rows.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} do not fit a bank of shape {tuple(self.rows.shape)}; expected the "
                "same width and not more rows; build the bank for this teacher and this batch size"
            )
        real = torch.ones_like(image_id, dtype=torch.bool) if valid is None else valid
        # the valid first, in their order, into places that differ; the others put back what is there
        order = (~real).long().argsort(stable=True)
        places = (self.pushed + torch.arange(len(rows), device=rows.device)) % self.capacity
        real = real[order]
        self.rows[places] = torch.where(real.unsqueeze(1), rows[order].to(self.rows.dtype), self.rows[places])
        self.image_id[places] = torch.where(real, image_id[order], self.image_id[places])
        self.pushed += real.sum()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over the rows, their order and the place of the next. Raises ValueError for a bank of another size."""
        saved = tuple(state_dict["rows"].shape)
        if saved != tuple(self.rows.shape):
            raise ValueError(
                f"the saved bank has shape {saved}, this one {tuple(self.rows.shape)}; expected the same; resume with "
                "the teacher and the bank=… that the run was started with"
            )
        return super().load_state_dict(state_dict, strict, assign)
