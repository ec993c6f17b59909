"""The ways of rows through the towers: once with a graph, or twice, of which the second has the draws of the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt.data import Batch
from lilt.model import Teacher
from lilt.towers.front import Front
from lilt.train.learner import Outputs
from lilt.train.randomness import RandomState, random_state, set_random_state


class Again(NamedTuple):
    """A piece that waits for its second pass: where the random numbers stood, and what the fronts gave, as stored."""

    piece: Batch
    state: RandomState
    stored: Mapping[str, Tensor]
    types: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Towers:
    """What rows go through on their way to the loss."""

    model: nn.Module
    accelerator: Accelerator
    teacher: Teacher | None
    fronts: Mapping[str, Front]

    def __call__(self, piece: Batch) -> tuple[Outputs, Tensor | None]:
        """Return the outputs of a piece and what the teacher says of it."""
        moved = piece.to(self.accelerator.device)
        taught = self._taught(moved)
        return self.model(moved.images, moved.tokens, _of(moved.stored, self.fronts)), taught

    @torch.no_grad()
    def first(self, piece: Batch, keep: Callable[[Tensor], Tensor]) -> tuple[Outputs, Tensor | None, Again]:
        """Return the same without a graph, and what the second pass needs."""
        moved = piece.to(self.accelerator.device)
        taught, state = self._taught(moved), random_state(self.accelerator.device)
        known = _of(moved.stored, self.fronts)
        with _recording(self.fronts, known) as kept:
            out = self.model(moved.images, moved.tokens, known)
        stored = _of(piece.stored, self.fronts) | {side: keep(rows) for side, rows in kept.items()}
        return out, taught, Again(piece, state, stored, {side: rows.dtype for side, rows in (known | kept).items()})

    def second(self, again: Again) -> Outputs:
        """Return the outputs of a piece once more, with the same dropout."""
        device, piece = self.accelerator.device, again.piece
        set_random_state(device, again.state)
        known = {side: rows.to(device, again.types[side]) for side, rows in again.stored.items()}
        if "vision" in known and self.fronts["vision"].blind:
            piece = replace(piece, images=piece.images[:, :0])  # nobody looks at them again
        moved = piece.to(device)
        out: Outputs = self.model(moved.images, moved.tokens, known)
        return out

    def _taught(self, piece: Batch) -> Tensor | None:
        if self.teacher is None or "teacher" in piece.stored:
            return piece.stored.get("teacher")
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(piece.images)


def _of(stored: Mapping[str, Tensor], fronts: Mapping[str, Front]) -> dict[str, Tensor]:
    """Return what is stored of fronts; a teacher's rows are not for the model."""
    return {side: rows for side, rows in stored.items() if side in fronts}


@contextmanager
def _recording(fronts: Mapping[str, Front], known: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what the fronts of the towers give in the forward that runs inside, but for the sides that are known."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        kept = {side: stack.enter_context(front.recording()) for side, front in fronts.items() if side not in known}
        yield found
        found.update((side, rows[0]) for side, rows in kept.items())
