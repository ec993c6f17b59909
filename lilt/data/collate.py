"""From pairs to a batch of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lilt.data.dataset import Pair
from lilt.data.store import Store
from lilt.towers.base import Tokenizer


@dataclass(frozen=True)
class Batch:
    """B pairs: images (B, 3, H, W), token tensors (B, L), ids (B,) of image and text, and which rows are real (B,).

    A row whose image could not be read holds zeros and is not valid: it is left out of the loss, never replaced.
    stored: rows (B, …) of what was computed before, by name; with those of the vision tower, images is (B, 0).
    """

    images: Tensor
    tokens: dict[str, Tensor]
    image_id: Tensor
    text_id: Tensor
    valid: Tensor
    faults: list[tuple[str, str]] = field(default_factory=list)
    stored: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without waiting where the memory is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        tokens = {key: value.to(device, non_blocking=True) for key, value in self.tokens.items()}
        stored = {key: value.to(device, non_blocking=True) for key, value in self.stored.items()}
        return replace(self, tokens=tokens, stored=stored, **moved)

    def own(self) -> Batch:
        """Copy the tensors, so that nothing of them is shared with a data worker."""
        moved = {name: getattr(self, name).clone() for name in _TENSORS}
        tokens = {key: value.clone() for key, value in self.tokens.items()}
        return replace(self, tokens=tokens, stored={key: value.clone() for key, value in self.stored.items()}, **moved)

    def split(self, rows: int) -> list[Batch]:
        """Return the batch in pieces of so many rows, the last one of what is left; faults stay with the whole."""
        pieces = {name: getattr(self, name).split(rows) for name in _TENSORS}
        tokens = {key: value.split(rows) for key, value in self.tokens.items()}
        stored = {key: value.split(rows) for key, value in self.stored.items()}
        return [
            Batch(
                tokens={key: value[i] for key, value in tokens.items()},
                stored={key: value[i] for key, value in stored.items()},
                **{name: v[i] for name, v in pieces.items()},
            )
            for i in range(len(pieces["valid"]))
        ]

    def pin_memory(self) -> Batch:
        """Pin the tensors; called by the data loader."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        tokens = {key: value.pin_memory() for key, value in self.tokens.items()}
        stored = {key: value.pin_memory() for key, value in self.stored.items()}
        return replace(self, tokens=tokens, stored=stored, **pinned)


_TENSORS = ("images", "image_id", "text_id", "valid")


class Collate:
    """Turn pairs into a batch; a class, so that spawned workers can receive it.

    stores: what was computed before and is read instead: "vision" and "teacher" by the number of a view, "text" by that
    of a caption; images is how many images there are, of which each view holds one.
    """

    def __init__(self, tokenizer: Tokenizer, image_shape: tuple[int, ...], max_tokens: int | None = None):
        self.tokenizer, self.image_shape, self.max_tokens = tokenizer, image_shape, max_tokens
        self.stores: dict[str, Store] = {}
        self.images = 0

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        image_id = torch.tensor([p.image_id for p in pairs])
        text_id = torch.tensor([p.text_id for p in pairs])
        view = torch.tensor([p.view for p in pairs]) * self.images + image_id
        stored = {name: store.get(text_id if name == "text" else view) for name, store in self.stores.items()}
        if "vision" in self.stores:
            images, valid = torch.empty(len(pairs), 0), torch.ones(len(pairs), dtype=torch.bool)
        else:
            blank = torch.zeros(self.image_shape)
            images = torch.stack([blank if p.image is None else p.image for p in pairs])
            valid = torch.tensor([p.image is not None for p in pairs])
        for name, store in self.stores.items():
            valid = valid & store.good(text_id if name == "text" else view)
        return Batch(
            images=images,
            tokens=self.tokenizer.pad(self._encoded(pairs)),
            image_id=image_id,
            text_id=text_id,
            valid=valid,
            faults=[p.fault for p in pairs if p.fault is not None],
            stored=stored,
        )

    def _encoded(self, pairs: Sequence[Pair]) -> list[dict[str, list[int]]]:
        # all texts at once: one by one they take more than twice as long
        texts = [p.tokens for p in pairs if isinstance(p.tokens, str)]
        fresh = iter(self.tokenizer.encode(texts, self.max_tokens)[0] if texts else [])
        return [next(fresh) if isinstance(p.tokens, str) else p.tokens for p in pairs]
