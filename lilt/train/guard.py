"""Steps whose gradient is no number are left out, on all ranks alike, counted, and explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilt import distributed


@dataclass(frozen=True)
class _Seen:
    """What one step left to look at later, on its device: is the gradient finite, and whose outputs are not."""

    step: int
    finite: Tensor  # ()
    broken: Tensor  # (B,) of our rows
    image_id: Tensor  # (B,)


class Guard:
    """Leaves out bad steps without asking the device each time, and stops the run after `limit` of them in a row.

    The norm of the synchronised gradient is the same on all ranks, so they do the same without a word. names[image_id]
    says what an image is called. Its counts are part of the resume state.
    """

    def __init__(self, limit: int, names: Sequence[str]):
        self.limit, self.names = limit, names
        self.skipped = 0  # in the whole run
        self.in_a_row = 0
        self._waiting: list[_Seen] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what resume needs."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def step(self, optimizer: Any, step: int, norm: Tensor, broken: Tensor, image_id: Tensor) -> None:
        """Let an optimizer do its step unless the norm of the gradient is not finite."""
        finite = torch.isfinite(norm)
        self.note(step, finite, broken, image_id)
        inner = getattr(optimizer, "optimizer", optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False):
            # fused optimizers look at this flag on the device, as they do for torch's own gradient scaler
            inner.grad_scale, inner.found_inf = None, (~finite).float()
            optimizer.step()
            del inner.grad_scale, inner.found_inf
        elif bool(finite):
            optimizer.step()

    def note(self, step: int, finite: Tensor, broken: Tensor, image_id: Tensor) -> None:
        """Remember a step that another has decided on."""
        self._waiting.append(_Seen(step, finite, broken, image_id))

    def settle(self, kept: str) -> list[str]:
        """Look at the steps since the last time; return a line on each that was left out. All ranks must call it.

        Raises ValueError after `limit` bad steps in a row, with what is kept of the run.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        # one copy from the device for all of them
        everybody = distributed.gather_objects(torch.stack([seen.finite for seen in waiting]).tolist())
        said = []
        for seen, good in zip(waiting, map(all, zip(*everybody, strict=True)), strict=True):
            self.in_a_row = 0 if good else self.in_a_row + 1
            if good:
                continue
            self.skipped += 1
            why = self._culprits(seen)
            said.append(f"step {seen.step} was left out: its gradient is not finite; {why}")
            if self.in_a_row >= self.limit:
                raise ValueError(
                    f"the gradient was not finite in {self.in_a_row} steps in a row, the last one step {seen.step}; "
                    f"{why}. {kept}: start again with a lower --lr or --head_lr, or with --precision no, or mend the "
                    "data"
                )
        return said

    def _culprits(self, seen: _Seen) -> str:
        ours = seen.image_id[seen.broken.to(seen.image_id.device)].tolist()  # the numbers never left the host
        found = [row for rows in distributed.gather_objects(ours) for row in rows]
        total = len(seen.broken) * distributed.world_size()
        if not found:
            return "all embeddings of its batch are, so it broke on the way back"
        if len(found) == total:
            return f"so are all {total} rows of its batch, which points at the weights"
        names = [self.names[row] for row in sorted(set(found))]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"{len(found)} of {total} rows of its batch are broken: {', '.join(names[:5])}{more}"
