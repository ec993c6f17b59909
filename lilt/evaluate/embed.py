"""Embed a split: each image and each distinct caption once, on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lilt.data import Sample
from lilt.evaluate.retrieval import Score, cosines, retrieval
from lilt.evaluate.rows import Advance, at_rest, image_rows, text_rows
from lilt.model import TwoTower
from lilt.towers import ImageContract

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded(Generic[T]):
    """Unit rows of the images that could be read (N, D) and of their captions (M, D); owner (M,) indexes the images.

    Or the tokens of each, as `Bags`.
    """

    image: T
    text: T
    owner: Tensor
    expected_images: int
    faults: list[tuple[str, str]]
    cut: int


def embed_split(
    model: TwoTower,
    samples: Sequence[Sample],
    *,
    batch_size: int = 128,
    max_tokens: int | None = None,
    workers: int = 0,
    advance: Advance = lambda count: None,
    advance_texts: Advance = lambda count: None,
) -> Embedded[Tensor]:
    """Embed a split in eval mode and restore the mode; every rank does its share and all get the whole.

    advance is told of images, advance_texts of distinct captions.
    """
    contract, tokenizer = model.vision.contract, model.text.contract
    assert isinstance(contract, ImageContract)
    assert not isinstance(tokenizer, ImageContract)
    texts = distinct(samples)
    with at_rest(model) as device:
        images = image_rows(
            contract,
            [str(s.image) for s in samples],
            lambda batch, _: model.encode_image(batch),
            device,
            batch_size=batch_size,
            workers=workers,
            advance=advance,
        )
        options: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "advance": advance_texts}
        rows, cut = text_rows(tokenizer, texts, model.encode_text, device, **options)
    owner, which = owners(samples, images.which, texts)
    return Embedded(images.rows, rows[which], owner, len(samples), images.faults, cut)


def distinct(samples: Sequence[Sample]) -> list[str]:
    """Return the captions of samples, each once."""
    return sorted({caption for sample in samples for caption in sample.captions})


def owners(samples: Sequence[Sample], read: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return of each caption (M,) of the images read (N,) which image it belongs to, and which of the texts it is."""
    number = {text: i for i, text in enumerate(texts)}
    wanted = [(place, number[c]) for place, i in enumerate(read.tolist()) for c in samples[i].captions]
    owner, which = torch.tensor(wanted, dtype=torch.long).view(-1, 2).unbind(1)
    return owner, which


def evaluate_retrieval(model: TwoTower, samples: Sequence[Sample], **options: Any) -> dict[str, Any]:
    """Embed a split and return its recalls, with what could not be evaluated counted."""
    return recalls(embed_split(model, samples, **options))


def recalls(embedded: Embedded, score: Score = cosines) -> dict[str, Any]:
    """Return the recalls of what was embedded, with what could not be evaluated counted."""
    if len(embedded.image) == 0:
        raise ValueError(
            f"none of the {embedded.expected_images} images could be read (first: {embedded.faults[0]}); expected "
            "image files; check --image_root"
        )
    result = retrieval(embedded.image, embedded.text, embedded.owner, score=score)
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
