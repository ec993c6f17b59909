"""From pairs to a batch of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lilt.data.dataset import Pair
from lilt.towers.base import Tokenizer


@dataclass(frozen=True)
class Batch:
    """B pairs: images (B, 3, H, W), token tensors (B, L), ids (B,) of image and text, and which rows are real (B,).

    A row whose image could not be read holds zeros and is not valid: it is left out of the loss, never replaced.
    """

    images: Tensor
    tokens: dict[str, Tensor]
    image_id: Tensor
    text_id: Tensor
    valid: Tensor
    faults: list[tuple[str, str]] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without waiting where the memory is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        tokens = {key: value.to(device, non_blocking=True) for key, value in self.tokens.items()}
        return replace(self, tokens=tokens, **moved)

    def split(self, rows: int) -> list[Batch]:
        """Return the batch in pieces of so many rows, the last one of what is left; faults stay with the whole."""
        pieces = {name: getattr(self, name).split(rows) for name in _TENSORS}
        tokens = {key: value.split(rows) for key, value in self.tokens.items()}
        return [
            Batch(tokens={k: v[i] for k, v in tokens.items()}, **{k: v[i] for k, v in pieces.items()})
            for i in range(len(pieces["valid"]))
        ]

    def pin_memory(self) -> Batch:
        """Pin the tensors; called by the data loader."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, tokens={key: value.pin_memory() for key, value in self.tokens.items()}, **pinned)


_TENSORS = ("images", "image_id", "text_id", "valid")


class Collate:
    """Turn pairs into a batch; a class, so that spawned workers can receive it."""

    def __init__(self, tokenizer: Tokenizer, image_shape: tuple[int, ...], max_tokens: int | None = None):
        self.tokenizer, self.image_shape, self.max_tokens = tokenizer, image_shape, max_tokens

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        blank = torch.zeros(self.image_shape)
        return Batch(
            images=torch.stack([blank if p.image is None else p.image for p in pairs]),
            tokens=self.tokenizer.pad(self._encoded(pairs)),
            image_id=torch.tensor([p.image_id for p in pairs]),
            text_id=torch.tensor([p.text_id for p in pairs]),
            valid=torch.tensor([p.image is not None for p in pairs]),
            faults=[p.fault for p in pairs if p.fault is not None],
        )

    def _encoded(self, pairs: Sequence[Pair]) -> list[dict[str, list[int]]]:
        # all texts at once: one by one they take more than twice as long
        texts = [p.tokens for p in pairs if isinstance(p.tokens, str)]
        fresh = iter(self.tokenizer.encode(texts, self.max_tokens)[0] if texts else [])
        return [next(fresh) if isinstance(p.tokens, str) else p.tokens for p in pairs]
