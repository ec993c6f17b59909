"""One batch to one gradient: encode our rows, gather everybody's, compare; in one piece or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt import distributed
from lilt.data import Batch
from lilt.losses import Loss, Relation, Softmax
from lilt.model import Teacher, TwoTower
from lilt.towers.front import Front
from lilt.train.distill import Distiller
from lilt.train.engine import finish, silent

Outputs = dict[str, Tensor]  # of a forward pass: rows (B, …), and numbers without dimension
Parts = dict[str, Tensor]


class Step(NamedTuple):
    """The loss of a step (), its parts (), and which of our rows (B,) have embeddings that are no numbers."""

    loss: Tensor
    parts: Parts
    broken: Tensor


class Learner(nn.Module):
    """What is trained: the model, and beside it the distillation head, which only training needs."""

    def __init__(self, core: TwoTower, distiller: Distiller | None = None, fronts: Mapping[str, Front] | None = None):
        super().__init__()
        self.core = core
        self.distiller = distiller
        self.fronts = fronts or {}

    def forward(
        self, images: Tensor, tokens: dict[str, Tensor], stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Outputs:
        """Encode pairs; stored: what the front of a tower gave, by its side, from where that tower then begins."""
        with ExitStack() as stack:
            for side, rows in stored.items():
                stack.enter_context(self.fronts[side].resumed(rows))
            if "vision" in stored and self.fronts["vision"].blind:
                images = self.fronts["vision"].blank(stored["vision"])
            made = self.core(images, tokens)
        out = {"image": made.image, "text": made.text}
        if self.core.scale.log.requires_grad:  # else the loss has no use for it
            out["scale"] = made.scale
        if made.bias is not None:
            out["bias"] = made.bias
        if made.hidden is not None:
            out["image_hidden"], out["text_hidden"] = made.hidden
        if self.distiller is not None:
            assert made.features is not None
            out["image_student"], out["text_student"] = self.distiller(*made.features)
            if self.distiller.scale is not None:
                out["student_scale"] = self.distiller.scale()
        return out

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name: those of the model, then those that only training needs."""
        beside = {} if self.distiller is None else dict(self.distiller.named_parameters(prefix="distiller"))
        return self.core.trained() | beside

    def clamp_(self) -> None:
        """Bring all learned factors back into their ranges."""
        self.core.scale.clamp_()
        if self.distiller is not None:
            self.distiller.clamp_()


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
    batch: Batch,
    accelerator: Accelerator,
    micro_batch: int | None = None,
    teacher: Teacher | None = None,
    fronts: Mapping[str, Front] = MappingProxyType({}),
    ready: Callable[[], None] = lambda: None,
    careful: bool = False,
) -> Step:
    """Add the gradient of a batch to the trained tensors.

    With micro_batch rows at a time, the memory of the towers is that of one micro-batch and the gradient still that of
    the whole: a first pass keeps the outputs alone, the loss gives their gradient, a second pass carries it into the
    towers, with the same dropout. The frozen front of a tower is run once: what it gives is kept for the second pass.
    ready is called before ranks wait for one another. careful: gradients are exchanged behind the way back, not on it.
    Source: Gao et al. 2021, arXiv 2101.06983.
    """
    taught = batch.stored.get("teacher")
    batch = replace(batch, stored={side: rows for side, rows in batch.stored.items() if side in fronts})
    pieces = [batch] if micro_batch is None or micro_batch >= len(batch.image_id) else batch.split(micro_batch)
    if teacher is not None and taught is None:
        with torch.no_grad(), accelerator.autocast():
            taught = torch.cat([teacher(piece.images) for piece in pieces])
    if len(pieces) == 1:
        with silent(accelerator, model) if careful else nullcontext():
            out = model(batch.images, batch.tokens, batch.stored)
            ready()
            loss, parts = objective(out, batch, taught)
            accelerator.backward(loss)
        if careful:
            ready()
        finish(accelerator, model, careful)
        objective.remember()
        return Step(loss.detach(), parts, _broken(out))
    states, made, stored = [], [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(random_state(accelerator.device))
            with _recording(fronts, piece.stored) as kept:
                made.append(model(piece.images, piece.tokens, piece.stored))
            stored.append({**piece.stored, **kept})
    ready()
    leaves = {name: _joined([out[name] for out in made]).requires_grad_() for name in made[0]}
    loss, parts = objective(leaves, batch, taught)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    after = random_state(accelerator.device)
    for number, (piece, state, known) in enumerate(zip(pieces, states, stored, strict=True)):
        last = number == len(pieces) - 1
        set_random_state(accelerator.device, state)
        if last:
            ready()
        # one exchange of gradients a step, behind the last piece
        with nullcontext() if last else silent(accelerator, model):
            out = model(piece.images, piece.tokens, known)
            accelerator.backward(_carried(out, gradients, number * len(pieces[0].image_id)))
    set_random_state(accelerator.device, after)
    finish(accelerator, model)
    objective.remember()
    return Step(loss.detach(), parts, _broken(leaves))


@contextmanager
def _recording(fronts: Mapping[str, Front], known: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what the fronts of the towers give in the forward that runs inside, but for the sides that are known."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        kept = {side: stack.enter_context(front.recording()) for side, front in fronts.items() if side not in known}
        yield found
        found.update((side, rows[0]) for side, rows in kept.items())


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


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the states of the generators that dropout draws from."""
    return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Put them back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])
