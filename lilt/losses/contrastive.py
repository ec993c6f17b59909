"""Contrastive losses: pure functions of gathered embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_contrastive(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    rows: slice,
    positives: Tensor | None = None,
    ignored: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE of rows that belong together, averaged over valid rows and both directions.

    image and text (G, D) are already gathered and have unit rows; rows selects the B that are ours; scale > 0 is a
    scalar. positives (B, G) is boolean, by default row i belongs to column rows.start + i; several positives share the
    weight. ignored (B, G) pairs count neither as positive nor as negative. valid (G,) excludes padding rows. The
    mean of the returned value over ranks is the loss of the joint batch.
    Raises ValueError when a valid row has no positive.
    Source: Radford et al. 2021, fig. 3; several positives as in Khosla et al. 2020, L_out.
    """
    total, ours = len(image), rows.stop - rows.start
    columns = torch.arange(total, device=image.device)
    if positives is None:
        positives = columns[rows].unsqueeze(1) == columns
    out = torch.zeros((), dtype=torch.bool, device=image.device) if ignored is None else ignored & ~positives
    weight = torch.ones(ours, dtype=image.dtype, device=image.device)
    if valid is not None:
        real = valid[rows]
        # a row that is not real keeps all its columns: a sum over none is -inf, and -inf * 0 is NaN
        out, positives = (out | ~valid) & real.unsqueeze(1), positives & valid
        weight = real.to(image.dtype)
    if positives.device.type == "cpu" and not bool((positives.any(1) | (weight == 0)).all()):
        raise ValueError(
            "a row of the batch has no positive; each valid row needs at least its own pair: check positives"
        )
    share = positives.to(image.dtype)
    share = share / share.sum(1, keepdim=True).clamp(min=1)
    # our share of the valid rows of the joint batch, so that the mean over ranks is the joint mean
    count = (total if valid is None else valid.sum().clamp(min=1).to(image.dtype)) * (ours / total)

    def direction(ours_: Tensor, theirs: Tensor) -> Tensor:
        logits = (scale * ours_ @ theirs.T).masked_fill(out, float("-inf"))
        # -inf * 0 is NaN, so the ignored columns leave the sum before the product
        chosen = (logits.masked_fill(~positives, 0.0) * share).sum(1)
        return ((logits.logsumexp(1) - chosen) * weight).sum() / count

    to_text = direction(image[rows], text)
    to_image = direction(text[rows], image)
    return (to_text + to_image) / 2, {"image_to_text": to_text.detach(), "text_to_image": to_image.detach()}
