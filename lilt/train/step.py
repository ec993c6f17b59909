"""One batch to one gradient: encode our rows, gather everybody's, compare; in one piece or in micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt import distributed
from lilt.data import Batch
from lilt.losses import Loss, Relation, Softmax
from lilt.model import Teacher, TwoTower
from lilt.train.distill import Distiller

Outputs = dict[str, Tensor]  # of a forward pass: rows (B, …), and numbers without dimension
Parts = dict[str, Tensor]


class Step(NamedTuple):
    """The loss of a step (), its parts (), and which of our rows (B,) have embeddings that are no numbers."""

    loss: Tensor
    parts: Parts
    broken: Tensor


class Learner(nn.Module):
    """What is trained: the model, and beside it the distillation head, which only training needs."""

    def __init__(self, core: TwoTower, distiller: Distiller | None = None):
        super().__init__()
        self.core = core
        self.distiller = distiller

    def forward(self, images: Tensor, tokens: dict[str, Tensor]) -> Outputs:
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
) -> Step:
    """Add the gradient of a batch to the trained tensors.

    With micro_batch rows at a time, the memory of the towers is that of one micro-batch and the gradient still that of
    the whole: a first pass keeps the outputs alone, the loss gives their gradient, a second pass carries it into the
    towers, with the same dropout.
    Source: Gao et al. 2021, arXiv 2101.06983.
    """
    pieces = [batch] if micro_batch is None or micro_batch >= len(batch.image_id) else batch.split(micro_batch)
    taught = None
    if teacher is not None:
        with torch.no_grad(), accelerator.autocast():
            taught = torch.cat([teacher(piece.images) for piece in pieces])
    if len(pieces) == 1:
        out = model(batch.images, batch.tokens)
        loss, parts = objective(out, batch, taught)
        accelerator.backward(loss)
        objective.remember()
        return Step(loss.detach(), parts, _broken(out))
    states, made = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(_random_state(accelerator.device))
            made.append(model(piece.images, piece.tokens))
    leaves = {name: _joined([out[name] for out in made]).requires_grad_() for name in made[0]}
    loss, parts = objective(leaves, batch, taught)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    after = _random_state(accelerator.device)
    for number, (piece, state) in enumerate(zip(pieces, states, strict=True)):
        last = number == len(pieces) - 1
        _set_random_state(accelerator.device, state)
        # one exchange of gradients a step, behind the last piece
        with nullcontext() if last else accelerator.no_sync(model):
            out = model(piece.images, piece.tokens)
            accelerator.backward(_carried(out, gradients, number * len(pieces[0].image_id)))
    _set_random_state(accelerator.device, after)
    objective.remember()
    return Step(loss.detach(), parts, _broken(leaves))


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


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])
