"""One batch to one gradient: encode our rows, gather everybody's, compare; in one piece or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt import distributed
from lilt.data import Batch
from lilt.losses import Loss, Relation, Softmax
from lilt.model import Teacher
from lilt.towers.front import Front
from lilt.train.distill import Distiller
from lilt.train.engine import finish, silent
from lilt.train.learner import Outputs
from lilt.train.passes import Towers
from lilt.train.randomness import random_state, set_random_state

Parts = dict[str, Tensor]
HELD = 8  # pieces of a batch; in more of them one passed once saves next to nothing, and its memory adds to the loss's


class Step(NamedTuple):
    """The loss of a step (), its parts (), and which of our rows (B,) have embeddings that are no numbers."""

    loss: Tensor
    parts: Parts
    broken: Tensor


class Objective:
    """From what a batch became to its loss: contrastive, and beside it the distance from a teacher.

    The mean over ranks is the loss of the joint batch, and with the gradients averaged as DDP does, so is its gradient.
    same says what pairs with one image or one caption in common are. A model with a second contrastive point is judged
    by the mean of the two.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        same: str = "positive",
        distiller: Distiller | None = None,
        distill_weight: float = 1.0,
    ):
        self.loss = loss or Softmax()
        self.same, self.distiller, self.distill_weight = same, distiller, distill_weight

    def __call__(self, out: Outputs, batch: Batch, taught: Tensor | None = None) -> tuple[Tensor, Parts]:
        """Return the loss of our rows and its parts; taught (B, T) is what the teacher says of them."""
        size = len(batch.image_id)
        rows = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
        facts = torch.stack([batch.image_id, batch.text_id, batch.valid.long()], dim=1)
        image_id, text_id, valid = distributed.gather(facts).unbind(1)
        valid = valid.bool()
        told = Relation(image_id, text_id, valid, self.same)
        loss, parts = self._compare(out, "image", "text", rows, told)
        if "image_hidden" in out:
            second, more = self._compare(out, "image_hidden", "text_hidden", rows, told)
            loss, parts = (loss + second) / 2, parts | {f"hidden_{name}": value for name, value in more.items()}
        if self.distiller is None:
            return loss, parts
        assert taught is not None
        image, text = out["image_student"], out["text_student"]
        if self.distiller.objective.gathers:
            image, text = distributed.gather(image), distributed.gather(text)
        teacher = distributed.gather(taught)
        distance, more = self.distiller.loss(
            image, text, teacher, rows=rows, image_id=image_id, valid=valid, scale=out.get("student_scale")
        )
        self._seen = teacher, image_id, valid
        return loss + self.distill_weight * distance, {"contrastive": loss.detach(), **parts, **more}

    def _compare(self, out: Outputs, image: str, text: str, rows: slice, told: Relation) -> tuple[Tensor, Parts]:
        gathered = distributed.gather(out[image]), distributed.gather(out[text])
        return self.loss(*gathered, out.get("scale"), out.get("bias"), rows=rows, relation=told)

    def remember(self) -> None:
        """Let the memory bank have the batch; after its backward pass, which still needs the rows that go."""
        if self.distiller is not None:
            self.distiller.remember(*self._seen)


def backward(
    model: nn.Module,
    objective: Objective,
    batch: Sequence[Batch],
    accelerator: Accelerator,
    micro_batch: int | None = None,
    teacher: Teacher | None = None,
    fronts: Mapping[str, Front] = MappingProxyType({}),
    ready: Callable[[], None] = lambda: None,
    careful: bool = False,
    keep: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Step:
    """Add the gradient of a batch, which comes in one piece or several, to the trained tensors.

    With micro_batch rows at a time, the memory of the towers is that of one micro-batch and the gradient still that of
    the whole: a first pass keeps the outputs alone, the loss gives their gradient, a second pass carries it into the
    towers, with the same dropout. The frozen front of a tower is run once: what it gives is kept for the second pass.
    Of a few pieces the last is passed once: it goes back first, with what its forward has kept.
    ready is called before ranks wait for one another. careful: gradients are exchanged behind the way back, not on it.
    keep puts what waits for the second pass where there is place.
    Source: Gao et al. 2021, arXiv 2101.06983.
    """
    pieces = [piece for part in batch for piece in part.split(micro_batch or len(part.valid))]
    facts = _facts(pieces).to(accelerator.device)
    towers = Towers(model, accelerator, teacher, fronts)
    if len(pieces) > 1:
        return _in_pieces(towers, objective, pieces, facts, ready, keep)
    with silent(accelerator, model) if careful else nullcontext():
        out, taught = towers(pieces[0])
        ready()
        loss, parts = objective(out, facts, taught)
        accelerator.backward(loss)
    if careful:
        ready()
    finish(accelerator, model, careful)
    objective.remember()
    return Step(loss.detach(), parts, _broken(out))


def _in_pieces(
    towers: Towers,
    objective: Objective,
    pieces: Sequence[Batch],
    facts: Batch,
    ready: Callable[[], None],
    keep: Callable[[Tensor], Tensor],
) -> Step:
    model, accelerator = towers.model, towers.accelerator
    twice = pieces[:-1] if len(pieces) <= HELD else pieces
    made, said, waiting = (list(column) for column in zip(*(towers.first(piece, keep) for piece in twice), strict=True))
    held: Outputs = {}
    if len(twice) < len(pieces):
        with silent(accelerator, model):
            held, heard = towers(pieces[-1])
        made.append({name: value.detach() for name, value in held.items()})
        said.append(heard)
    ready()
    leaves = {name: _joined([out[name] for out in made]).requires_grad_() for name in made[0]}
    taught = torch.cat([rows for rows in said if rows is not None]) if towers.teacher is not None else None
    loss, parts = objective(leaves, facts, taught)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    after = random_state(accelerator.device)
    if held:
        with silent(accelerator, model):
            accelerator.backward(_carried(held, gradients, len(facts.valid) - len(pieces[-1].valid)))
    start = 0
    for again in waiting:
        last = again is waiting[-1]
        if last:
            ready()
        # one exchange of gradients a step, behind the last piece
        with nullcontext() if last else silent(accelerator, model):
            accelerator.backward(_carried(towers.second(again), gradients, start))
        start += len(again.piece.valid)
    set_random_state(accelerator.device, after)
    finish(accelerator, model)
    objective.remember()
    return Step(loss.detach(), parts, _broken(leaves))


def _facts(pieces: Sequence[Batch]) -> Batch:
    """Return the ids of a batch that comes in pieces, without images and captions."""
    image_id, text_id, valid = (
        torch.cat([getattr(piece, name) for piece in pieces]) for name in ("image_id", "text_id", "valid")
    )
    return Batch(torch.empty(len(valid), 0), {}, image_id, text_id, valid)


def _broken(out: Outputs) -> Tensor:
    return ~(torch.isfinite(out["image"]).all(1) & torch.isfinite(out["text"]).all(1))


def _joined(parts: list[Tensor]) -> Tensor:
    """Join the rows of all pieces; a number is the same in each."""
    return torch.cat(parts) if parts[0].ndim else parts[0].clone()


def _carried(out: Outputs, gradients: dict[str, Tensor], start: int) -> Tensor:
    """Return the scalar whose gradient is the one that the whole batch sends through these rows."""
    terms = []
    for name, value in out.items():
        if value.ndim:
            terms.append((value * gradients[name][start : start + len(value)]).sum())
        else:  # each piece computes it, and it counts once
            terms.append(value * gradients[name] if start == 0 else value * 0)
    return torch.stack(terms).sum()
