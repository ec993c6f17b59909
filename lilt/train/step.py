"""One batch to one loss: encode our rows, gather everybody's, compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilt import distributed
from lilt.data import Batch
from lilt.losses import softmax_contrastive

SAME = ("positive", "ignored", "negative")


def contrastive_step(model: nn.Module, batch: Batch, same: str = "positive") -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of our rows against the gathered batch, and its parts.

    The mean over ranks is the loss of the joint batch, and with the gradients averaged as DDP does, so is its gradient.
    same says what pairs with one image or one caption in common are.
    """
    ours = model(batch.images, batch.tokens)
    size = len(batch.image_id)
    rows = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    image, text = distributed.gather(ours.image), distributed.gather(ours.text)
    facts = torch.stack([batch.image_id, batch.text_id, batch.valid.long()], dim=1)
    image_id, text_id, valid = distributed.gather(facts).unbind(1)
    positives, ignored = pair_up(image_id, text_id, rows, same)
    return softmax_contrastive(
        image, text, ours.scale, rows=rows, positives=positives, ignored=ignored, valid=valid.bool()
    )


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
