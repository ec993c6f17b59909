"""Pairs of image and caption, drawn by keys (draw, unit) alone: nothing depends on workers, ranks or restarts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lilt.data.images import Fault, read_image
from lilt.data.manifest import Sample
from lilt.data.order import Key, Order, draw_seed
from lilt.data.transforms import Transform
from lilt.towers.base import Text, Tokenizer

TEXTS = 10_000  # encoded at a time: as Python's numbers they take twenty times the memory


class TokenTable:
    """The encodings of many captions, made once, in flat int32 tensors that worker processes share."""

    def __init__(self, texts: Sequence[Text], tokenizer: Tokenizer, max_tokens: int | None = None):
        lengths, flat, self.cut = [torch.zeros(1, dtype=torch.int64)], defaultdict[str, list[Tensor]](list), 0
        for start in range(0, len(texts), TEXTS):
            encodings, cut = tokenizer.encode(texts[start : start + TEXTS], max_tokens)
            self.cut += cut
            lengths.append(torch.tensor([len(e["input_ids"]) for e in encodings]))
            for key in encodings[0]:
                flat[key].append(torch.tensor([v for e in encodings for v in e[key]], dtype=torch.int32))
        self.offsets = torch.cat(lengths).cumsum(0)
        self.flat = {key: torch.cat(parts) for key, parts in flat.items()}

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return {key: flat[start:stop].tolist() for key, flat in self.flat.items()}


@dataclass(frozen=True)
class Pair:
    """One image tensor (3, H, W), or None and why; one caption, encoded or as text; which image and text it is.

    view: which of its fixed views the image is in.
    """

    image: Tensor | None
    tokens: dict[str, list[int]] | str
    image_id: int
    text_id: int
    fault: Fault | None = None
    view: int = 0


class Pairs(Dataset[Pair], ABC):
    """Draws the pair of a key: the image, augmented by the key's own seed, and one of its captions.

    A unit is what an epoch shows once: an image with a caption picked anew each time (captions="one"), or a caption
    ("all"). paths[image_id] is what an image is called, groups (G,) the units of each shard, faults what could not be
    read before any unit, cut how many captions are known to be longer than the context.
    """

    def __init__(self, paths: Sequence[str], groups: Tensor, transform: Transform, seed: int):
        self.paths, self.groups, self.transform, self.seed = paths, groups, transform, seed
        self.faults: list[Fault] = []
        self.cut = 0

    def __len__(self) -> int:
        return int(self.groups.sum())

    def order(self, seed: int, window: int | None = None, resample: bool = False) -> Order:
        """Return the order of training; window counts where units lie in shards."""
        return Order(self.groups, seed=seed, resample=resample)

    def __getitem__(self, key: Key) -> Pair:
        draw, unit = key
        with torch.random.fork_rng(devices=[]):
            # the CPU generator alone: torch.manual_seed would also restart the dropout of an accelerator
            torch.default_generator.manual_seed(draw_seed(self.seed, draw, unit))
            return self.draw(unit)

    @abstractmethod
    def draw(self, unit: int) -> Pair:
        """Return the pair of a unit; whatever is random comes from torch's CPU generator, the caption first."""


class PairDataset(Pairs):
    """The pairs of a manifest; all captions are encoded once, before training.

    views: each image has so many augmented views, drawn once and for all; None: it is augmented anew each time. opens:
    whether images are opened at all, which they need not where what becomes of them is stored.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        transform: Transform,
        *,
        max_tokens: int | None = None,
        captions: str = "one",
        seed: int = 0,
        views: int | None = None,
    ):
        check_captions(captions)
        self.views, self.opens = views, True
        texts = sorted({c for s in samples for c in s.captions})
        number = {text: i for i, text in enumerate(texts)}
        self.texts = [[number[c] for c in s.captions] for s in samples]
        self.table = TokenTable(texts, tokenizer, max_tokens)
        self.every = (
            [(i, c) for i, ids in enumerate(self.texts) for c in range(len(ids))] if captions == "all" else None
        )
        units = len(samples) if self.every is None else len(self.every)
        super().__init__([str(s.image) for s in samples], torch.tensor([units]), transform, seed)
        self.cut = self.table.cut

    def draw(self, unit: int) -> Pair:
        """Return the pair of a unit."""
        if self.every is not None:
            image_id, caption = self.every[unit]
        else:
            image_id, caption = unit, int(torch.randint(len(self.texts[unit]), ()))
        text_id = self.texts[image_id][caption]
        view = 0 if self.views is None else int(torch.randint(self.views, ()))
        image, fault = self.see(image_id, view) if self.opens else (None, None)
        return Pair(image, self.table[text_id], image_id, text_id, fault, view)

    def see(self, image_id: int, view: int) -> tuple[Tensor | None, Fault | None]:
        """Return an image in one of its views, or None and why not; whatever is random comes from the CPU generator."""
        if self.views is not None:
            torch.default_generator.manual_seed(draw_seed(~self.seed, view, image_id))
        return read_image(self.paths[image_id], self.transform)


def check_captions(captions: str) -> None:
    """Raise ValueError for a way with captions that nobody knows."""
    if captions not in ("one", "all"):
        raise ValueError(
            f"captions={captions!r}; expected 'one' (a random one per image and epoch) or 'all'; choose one"
        )
