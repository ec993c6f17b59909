"""Embed a split: each image and each distinct caption once, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lilt import distributed
from lilt.data import Sample, TokenTable, eval_transform, ignore_signals, read_image
from lilt.data.transforms import Transform
from lilt.evaluate.retrieval import retrieval
from lilt.model import TwoTower
from lilt.towers import ImageContract, Tokenizer

Advance = Callable[[int], None]


class _Images(Dataset[tuple[int, Tensor | None, tuple[str, str] | None]]):
    def __init__(self, paths: Sequence[str], transform: Transform, mine: Sequence[int]):
        self.paths, self.transform, self.mine = paths, transform, mine

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, tuple[str, str] | None]:
        index = self.mine[place]
        return index, *read_image(self.paths[index], self.transform)


def _stack(items: list[Any]) -> tuple[list[int], Tensor | None, list[tuple[str, str]]]:
    good = [(i, image) for i, image, _ in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return [i for i, _ in good], images, [fault for _, _, fault in items if fault is not None]


@dataclass(frozen=True)
class Embedded:
    """Unit rows of the images that could be read (N, D) and of their captions (M, D); owner (M,) indexes the images."""

    image: Tensor
    text: Tensor
    owner: Tensor
    expected_images: int
    faults: list[tuple[str, str]]
    cut: int


@torch.no_grad()
def embed_split(
    model: TwoTower,
    samples: Sequence[Sample],
    *,
    batch_size: int = 128,
    max_tokens: int | None = None,
    workers: int = 0,
    advance: Advance = lambda count: None,
) -> Embedded:
    """Embed a split in eval mode and restore the mode; every rank does its share and all get the whole."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        images, faults = _embed_images(model, [str(s.image) for s in samples], device, batch_size, workers, advance)
        texts = sorted({c for s in samples for c in s.captions})
        rows, cut = _embed_texts(model, texts, device, batch_size, max_tokens)
    finally:
        model.train(training)
    number = {text: i for i, text in enumerate(texts)}
    kept = sorted(images)
    wanted = [(place, number[c]) for place, i in enumerate(kept) for c in samples[i].captions]
    owner = torch.tensor([place for place, _ in wanted], dtype=torch.long)
    image = torch.stack([images[i] for i in kept]) if kept else torch.zeros(0, 1)
    return Embedded(image, rows[[t for _, t in wanted]], owner, len(samples), faults, cut)


def _embed_images(
    model: TwoTower, paths: Sequence[str], device: torch.device, batch_size: int, workers: int, advance: Advance
) -> tuple[dict[int, Tensor], list[tuple[str, str]]]:
    contract = model.vision.contract
    assert isinstance(contract, ImageContract)
    mine = range(distributed.rank(), len(paths), distributed.world_size())
    loader = DataLoader(
        _Images(paths, eval_transform(contract), mine),
        batch_size=batch_size,
        collate_fn=_stack,
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )
    found: dict[int, Tensor] = {}
    faults: list[tuple[str, str]] = []
    for indices, images, bad in loader:
        faults += bad
        if images is not None:
            found |= dict(zip(indices, model.encode_image(images.to(device)).cpu(), strict=True))
        advance(len(indices) + len(bad))
    merged: dict[int, Tensor] = {}
    every: list[tuple[str, str]] = []
    for part, bad in distributed.gather_objects((found, faults)):
        merged |= part
        every += bad
    return merged, every


def _embed_texts(
    model: TwoTower, texts: Sequence[str], device: torch.device, batch_size: int, max_tokens: int | None
) -> tuple[Tensor, int]:
    tokenizer: Tokenizer = model.text.contract  # type: ignore[assignment]
    table = TokenTable(texts, tokenizer, max_tokens)
    # captions of one length together waste no padding
    order = torch.argsort(table.offsets[1:] - table.offsets[:-1], stable=True)[
        distributed.rank() :: distributed.world_size()
    ]
    parts = []
    for chunk in order.split(batch_size):
        tokens = tokenizer.pad([table[int(i)] for i in chunk])
        parts.append(model.encode_text({k: v.to(device) for k, v in tokens.items()}).cpu())
    rows: dict[int, Tensor] = {}
    for share in distributed.gather_objects((order, torch.cat(parts) if parts else torch.zeros(0, 1))):
        rows |= dict(zip(share[0].tolist(), share[1], strict=True))
    return torch.stack([rows[i] for i in range(len(texts))]), table.cut


def evaluate_retrieval(model: TwoTower, samples: Sequence[Sample], **options: Any) -> dict[str, Any]:
    """Embed a split and return its recalls, with what could not be evaluated counted."""
    embedded = embed_split(model, samples, **options)
    if len(embedded.image) == 0:
        raise ValueError(
            f"none of the {len(samples)} images could be read (first: {embedded.faults[0]}); expected image files; "
            "check --image_root"
        )
    result = retrieval(embedded.image, embedded.text, embedded.owner)
    result["num_unreadable"] = embedded.expected_images - len(embedded.image)
    result["num_cut_captions"] = embedded.cut
    return result


def flat(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of a nested result, names joined by a slash."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", float(number)) for name, number in value.items())
        else:
            yield key, float(value)
