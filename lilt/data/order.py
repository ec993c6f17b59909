"""The order of training: a function of (seed, epoch, step) alone, whatever the number of ranks, workers or restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

Key = tuple[
    int, int
]  # draw, unit; the draw is the epoch, or where units are drawn with replacement a number of its own


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """Mix three numbers into one seed (a 63-bit linear congruence; neighbours must not share a stream)."""
    mixed = seed
    for part in (epoch, index):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


class Order:
    """Which unit stands at which place of an epoch.

    groups (G,) counts the units of each shard; a manifest is one group. In an epoch the groups follow one another in a
    random order, and their units are shuffled among each `window` of them: reading stays near a few shards, and memory
    is one window. Without a window all units of an epoch are shuffled at once. resample draws the groups with
    replacement (the units of a lone group) until an epoch is full.
    """

    def __init__(
        self, groups: Sequence[int] | Tensor, *, seed: int = 0, window: int | None = None, resample: bool = False
    ):
        if window is not None and window <= 0:
            raise ValueError(f"shuffle_buffer={window}; expected more than 0; give a few batches, or leave it out")
        sizes = torch.as_tensor(groups, dtype=torch.long)
        self.groups = torch.ones(int(sizes.sum()), dtype=torch.long) if resample and len(sizes) == 1 else sizes
        self.first = self.groups.cumsum(0) - self.groups
        self.count = int(sizes.sum())
        self.window = self.count if window is None else min(window, self.count)
        self.seed, self.resample = seed, resample
        self._groups: tuple[int, Tensor, Tensor, Tensor] | None = None  # of the last epoch asked for
        self._units: tuple[tuple[int, int], Tensor, Tensor] | None = None  # of the last window

    def __len__(self) -> int:
        return self.count

    def keys(self, epoch: int, start: int, stop: int) -> list[Key]:
        """Return the keys at the places from start to stop of an epoch."""
        found: list[Key] = []
        while start < stop:
            number, place = divmod(start, self.window)
            if self._units is None or self._units[0] != (epoch, number):
                self._units = (epoch, number), *self._shuffled(epoch, number)
            draws, units = (part[place : place + stop - start] for part in self._units[1:])
            found += zip(draws.tolist(), units.tolist(), strict=True)
            start += len(units)
        return found

    def _shuffled(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Return the draw and the unit at each place of a window."""
        low = number * self.window
        size = min(self.window, self.count - low)
        seed = self.seed + epoch if self.window == self.count else self._seed(epoch, 1 + number)
        places = low + torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        picks, ends, shifts = self._sequence(epoch)
        which = torch.searchsorted(ends, places, right=True)
        group = picks[which]
        units = self.first[group] + (places - ends[which] + shifts[which]) % self.groups[group]
        # a unit that comes twice in an epoch is augmented in two ways
        draws = (epoch << 32) + which if self.resample else torch.full_like(units, epoch)
        return draws, units

    def _sequence(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the groups of an epoch in their order, the places where each ends, and by how much each is turned."""
        if self._groups is None or self._groups[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed(epoch, 0))
            total = len(self.groups)
            picks = torch.arange(total)
            if self.resample:
                picks = torch.randint(total, (total,), generator=generator)
                while int(self.groups[picks].sum()) < self.count:
                    picks = torch.cat([picks, torch.randint(total, (total,), generator=generator)])
            elif self.window < self.count:  # in a window that holds everything all are shuffled anyway
                picks = torch.randperm(total, generator=generator)
            sizes = self.groups[picks]
            # each group starts anywhere in itself: else windows would always part it at the same units
            shifts = (torch.rand(len(picks), generator=generator, dtype=torch.float64) * sizes).long()
            if not self.resample and self.window == self.count:
                shifts.zero_()
            self._groups = epoch, picks, sizes.cumsum(0), shifts
        return self._groups[1:]

    def _seed(self, epoch: int, number: int) -> int:
        return draw_seed(~self.seed, epoch, number)  # streams apart from those of augmentation


class Batches(Sampler[list[Key]]):
    """Yields this rank's rows of each global batch, epoch after epoch, without an end; starts at any step.

    A global batch is the same set of pairs in the same order whatever the number of ranks. The last incomplete batch of
    an epoch is dropped; a set smaller than one batch is one batch. With piece, the rows of a batch come in lists of so
    many, the last one of what is left.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        piece: int | None = None,
    ):
        batch = min(batch_size, len(order))
        batch -= batch % world
        if batch == 0:
            raise ValueError(
                f"batch_size={batch_size} on {len(order)} pairs leaves no pair for each of {world} processes; use "
                "fewer processes, a larger batch or more data"
            )
        self.order, self.batch, self.rank, self.world, self.start = order, batch, rank, world, start
        self.steps_per_epoch = len(order) // batch
        self.ours = batch // world
        self.piece = min(piece or self.ours, self.ours)
        self.pieces = -(-self.ours // self.piece)  # of a batch

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.start
        while True:
            epoch, place = divmod(step, self.steps_per_epoch)
            first = place * self.batch + self.rank * self.ours
            for start in range(first, first + self.ours, self.piece):
                yield self.order.keys(epoch, start, min(start + self.piece, first + self.ours))
            step += 1
