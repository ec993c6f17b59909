"""One batch to one gradient: encode our rows, gather everybody's, compare; in one piece or in micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt import distributed
from lilt.data import Batch
from lilt.losses import softmax_contrastive
from lilt.model import TwoTower

SAME = ("positive", "ignored", "negative")
Outputs = dict[str, Tensor]  # of a forward pass: rows (B, …), and numbers without dimension
Parts = dict[str, Tensor]


class Step(NamedTuple):
    """The loss of a step (), its parts (), and which of our rows (B,) have embeddings that are no numbers."""

    loss: Tensor
    parts: Parts
    broken: Tensor


class Learner(nn.Module):
    """What is trained: the model, and beside it what only training needs."""

    def __init__(self, core: TwoTower):
        super().__init__()
        self.core = core

    def forward(self, images: Tensor, tokens: dict[str, Tensor]) -> Outputs:
        image, text, scale = self.core(images, tokens)
        return {"image": image, "text": text, "scale": scale}


class Objective:
    """From what a batch became to its loss.

    The mean over ranks is the loss of the joint batch, and with the gradients averaged as DDP does, so is its gradient.
    same says what pairs with one image or one caption in common are.
    """

    def __init__(self, same: str = "positive"):
        self.same = same

    def __call__(self, out: Outputs, batch: Batch) -> tuple[Tensor, Parts]:
        size = len(batch.image_id)
        rows = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
        image, text = distributed.gather(out["image"]), distributed.gather(out["text"])
        facts = torch.stack([batch.image_id, batch.text_id, batch.valid.long()], dim=1)
        image_id, text_id, valid = distributed.gather(facts).unbind(1)
        positives, ignored = pair_up(image_id, text_id, rows, self.same)
        return softmax_contrastive(
            image, text, out["scale"], rows=rows, positives=positives, ignored=ignored, valid=valid.bool()
        )


def backward(
    model: nn.Module, objective: Objective, batch: Batch, accelerator: Accelerator, micro_batch: int | None = None
) -> Step:
    """Add the gradient of a batch to the trained tensors.

    With micro_batch rows at a time, the memory of the towers is that of one micro-batch and the gradient still that of
    the whole: a first pass keeps the outputs alone, the loss gives their gradient, a second pass carries it into the
    towers, with the same dropout.
    Source: Gao et al. 2021, arXiv 2101.06983.
    """
    if micro_batch is None or micro_batch >= len(batch.image_id):
        out = model(batch.images, batch.tokens)
        loss, parts = objective(out, batch)
        accelerator.backward(loss)
        return Step(loss.detach(), parts, _broken(out))
    pieces = batch.split(micro_batch)
    states, made = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(_random_state(accelerator.device))
            made.append(model(piece.images, piece.tokens))
    leaves = {name: _joined([out[name] for out in made]).requires_grad_() for name in made[0]}
    loss, parts = objective(leaves, batch)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    after = _random_state(accelerator.device)
    for number, (piece, state) in enumerate(zip(pieces, states, strict=True)):
        last = number == len(pieces) - 1
        _set_random_state(accelerator.device, state)
        # one exchange of gradients a step, behind the last piece
        with nullcontext() if last else accelerator.no_sync(model):
            out = model(piece.images, piece.tokens)
            accelerator.backward(_carried(out, gradients, number * micro_batch))
    _set_random_state(accelerator.device, after)
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


def pair_up(image_id: Tensor, text_id: Tensor, rows: slice, same: str) -> tuple[Tensor, Tensor | None]:
    """Return which of the pairs (B, G) are positive and which are left out (None: none)."""
    if same not in SAME:
        raise ValueError(f"same={same!r}; expected one of {', '.join(SAME)}; choose one")
    own = torch.arange(len(image_id), device=image_id.device)
    diagonal = own[rows].unsqueeze(1) == own
    if same == "negative":
        return diagonal, None
    alike = (image_id[rows].unsqueeze(1) == image_id) | (text_id[rows].unsqueeze(1) == text_id)
    return (alike, None) if same == "positive" else (diagonal, alike & ~diagonal)
