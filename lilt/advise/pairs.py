"""The pairs that towers are compared on: each image once, with one caption that no other of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lilt.data import Sample

DEFAULT = 2000


@dataclass(frozen=True)
class Chosen:
    """N pairs: image i is shown with caption i."""

    images: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def only(self, which: Sequence[int]) -> Chosen:
        """Return some of the pairs."""
        return Chosen([self.images[i] for i in which], [self.captions[i] for i in which])


def choose(samples: Sequence[Sample], count: int, source: str, seed: int = 0) -> Chosen:
    """Draw pairs in an order that the seed alone decides; 0 stands for 2,000, or as many as there are.

    An image gives its first caption that is not yet taken, and none if all are: equal captions would be neighbours of
    one another whatever their images show. Captions that differ in case and spaces alone are equal, as they are to most
    tokenizers. Raises ValueError where fewer are found than were asked for.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    images: list[str] = []
    captions: list[str] = []
    taken: set[str] = set()
    for i in order:
        if len(images) == (count or DEFAULT):
            break
        path = str(samples[i].image)
        fresh = [c for c in samples[i].captions if _plain(c) not in taken]
        if path in taken or not fresh:
            continue
        taken |= {path, _plain(fresh[0])}
        images.append(path)
        captions.append(fresh[0])
    if len(images) < count:
        raise ValueError(
            f"pairs={count}: {source} has {len(samples)} images; expected {count} pairs with a caption of their own, "
            f"found {len(images)}; give --pairs {len(images)}, or more data"
        )
    return Chosen(images, captions)


def _plain(caption: str) -> str:
    """Return what is compared of a caption; a space in front tells it from a path."""
    return " " + " ".join(caption.split()).casefold()
