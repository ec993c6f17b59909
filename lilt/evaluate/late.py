"""Late interaction: an image and a text compared token by token, in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 2**24  # cosines in memory at once: 128 MiB in float64


@dataclass(frozen=True)
class Bags:
    """Unit rows (T, D) of tokens, and which of them each of N items has: sizes (N,) from starts (N,) on."""

    rows: Tensor
    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, rows: Tensor, sizes: Tensor) -> Bags:
        """Take the rows of one item after the other."""
        return cls(rows, sizes.cumsum(0) - sizes, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, some: slice | Tensor) -> Bags:
        """Return some of the items; the rows stay where they are."""
        return Bags(self.rows, self.starts[some], self.sizes[some])

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def longest(self) -> int:
        """Return how many tokens the largest item has."""
        return max(1, int(self.sizes.max())) if len(self) else 1

    def padded(self, device: torch.device) -> Tensor:
        """Return rows (N, L, D) in float64; a shorter item's last token is repeated, which changes no maximum."""
        places = torch.arange(self.longest, device=self.device).minimum(self.sizes.unsqueeze(1) - 1).clamp(min=0)
        at = (self.starts.unsqueeze(1) + places).clamp(max=len(self.rows) - 1)  # behind the last row there are none
        return self.rows[at].to(device).double()


def late(ours: Bags, theirs: Bags, device: torch.device | None = None, room: int = ROOM) -> Tensor:
    """Return scores (A, B): the mean over each of our tokens of its highest cosine with a token of theirs.

    So an image asks with s(image, text) and a text with s(text, image), which differ. No more than room cosines of
    tokens are in memory at once; they are summed in float64, so that equal items tie exactly.
    Source: Yao et al. 2021, arXiv 2111.07783 (FILIP), section 3.1.
    """
    target = ours.device if device is None or device.type == "mps" else device  # mps has no float64
    scores = torch.empty(len(ours), len(theirs), device=ours.device)
    ours_at_once = max(1, min(len(ours), int(room**0.5) // ours.longest))
    at_once = max(1, room // (ours_at_once * ours.longest * theirs.longest))
    for start in range(0, len(ours), ours_at_once):
        mine = ours[start : start + ours_at_once]
        x, sizes = mine.padded(target), mine.sizes.to(target).unsqueeze(1)
        repeated = torch.arange(x.shape[1], device=target) >= sizes
        for other in range(0, len(theirs), at_once):
            some = theirs[other : other + at_once]
            y = some.padded(target)
            cosines = x.flatten(0, 1) @ y.flatten(0, 1).T
            highest = cosines.view(*x.shape[:2], *y.shape[:2]).amax(3)
            mean = highest.masked_fill_(repeated.unsqueeze(2), 0).sum(1) / sizes
            scores[start : start + len(mine), other : other + len(some)] = mean.to(scores)
    # an item without a token is never found
    return scores.masked_fill_(theirs.sizes.to(scores.device) == 0, float("nan"))
