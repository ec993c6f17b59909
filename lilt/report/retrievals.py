"""What was found for a few captions and images, right and wrong ones, drawn by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.data import Sample
from lilt.evaluate import Embedded
from lilt.evaluate.retrieval import cosines, image_to_text_ranks, text_to_image_ranks

TOP = 5  # answers that are shown of each


@dataclass(frozen=True)
class Hit:
    """An answer: which image or caption, at which place from 1, its cosine, and whether it is a right one."""

    index: int
    place: int
    cosine: float
    own: bool


@dataclass(frozen=True)
class Search:
    """What was found for one caption or image: its number, the rank of its best right answer, and the best answers.

    The best right answer is among the hits wherever it stands.
    """

    query: int
    rank: int
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Gallery:
    """Searches both ways in a split: images (N) and captions (M) by their numbers, and what could not be read."""

    split: str
    images: tuple[Sample, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    by_caption: tuple[Search, ...]
    by_image: tuple[Search, ...]
    first: tuple[float, float]  # R@1 in percent, text -> image and image -> text
    faults: tuple[tuple[str, str], ...]


def search(embedded: Embedded, samples: Sequence[Sample], split: str, count: int) -> Gallery:
    """Return count searches each way, half of them right; which they are depends on the ranks alone."""
    unread = {path for path, _ in embedded.faults}
    images = tuple(sample for sample in samples if str(sample.image) not in unread)
    captions = tuple(caption for sample in images for caption in sample.captions)
    image, text, owner = embedded.image, embedded.text, embedded.owner
    assert (len(images), len(captions)) == (len(image), len(text))
    to_image, to_text = text_to_image_ranks(image, text, owner), image_to_text_ranks(image, text, owner)
    by_caption = [
        Search(i, int(to_image[i]), best(cosines(text[i : i + 1], image)[0], torch.arange(len(image)) == owner[i]))
        for i in draw(to_image, count)
    ]
    by_image = [
        Search(i, int(to_text[i]), best(cosines(image[i : i + 1], text)[0], owner == i)) for i in draw(to_text, count)
    ]
    first = 100 * float((to_image == 1).double().mean()), 100 * float((to_text == 1).double().mean())
    return Gallery(
        split,
        images,
        captions,
        tuple(owner.tolist()),
        tuple(by_caption),
        tuple(by_image),
        first,
        tuple(embedded.faults),
    )


def draw(ranks: Tensor, count: int) -> list[int]:
    """Return the numbers of count queries, half with rank 1 and half without where there are so many; right ones first.

    They are the first of a shuffle that is always the same, so that nobody has picked them.
    """
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(0)).tolist()
    right, wrong = [i for i in order if ranks[i] == 1], [i for i in order if ranks[i] != 1]
    some = max(min(count // 2, len(right)), count - len(wrong))
    return right[:some] + wrong[: max(0, count - some)]


def best(scores: Tensor, own: Tensor) -> tuple[Hit, ...]:
    """Return the best answers of scores (N,), own (N,) saying which are right, and the best right one wherever it is.

    As in the recalls, a right answer stands behind wrong ones that score the same, and NaN counts against the model.
    """
    broken = scores.isnan()
    ranked = torch.where(broken & own, -torch.inf, torch.where(broken, torch.inf, scores))
    behind = own.long().argsort(stable=True)
    order = behind[ranked[behind].argsort(descending=True, stable=True)]
    places = list(range(min(TOP, len(order))))
    first = int(own[order].long().argmax())
    if first not in places:
        places.append(first)
    answers = order[places].tolist()
    return tuple(Hit(i, place + 1, float(scores[i]), bool(own[i])) for i, place in zip(answers, places, strict=True))
