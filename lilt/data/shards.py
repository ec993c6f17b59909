"""WebDataset tars as data: read at any place through an index, so that order and resume are those of a manifest."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from lilt.data.dataset import Pair, Pairs, check_captions
from lilt.data.images import Fault, read_image
from lilt.data.order import Order
from lilt.data.shard_index import index_of, read_captions, read_member
from lilt.data.transforms import Transform

OPEN = 128  # shards that a process holds open


class _Tar(FileIO):
    """A file that is closed without a word when nobody holds it any more."""

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class _Open:
    """An open shard, its index as arrays, for single values of tensors are slow; ends (N,) adds up its captions."""

    stream: _Tar
    image: np.ndarray
    text: np.ndarray
    json: np.ndarray
    ends: np.ndarray


class ShardSet(Sequence[str]):
    """The samples of several tars, numbered through; as a sequence, their names `tar:key`.

    Raises ValueError when no shard holds a sample. A torn tar gives what stands before the tear, and a fault.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = [str(file) for file in files]
        self.faults: list[Fault] = []
        images, captions = [], []
        for file in files:
            index = index_of(file)
            images.append(len(index))
            # a sample without captions is drawn too, to be counted as a fault
            captions.append(int(index.count.clamp(min=1).sum()))
            if index.torn:
                self.faults.append((str(file), f"torn after {len(index):,} samples: {index.torn}"))
        self.images, self.captions = torch.tensor(images), torch.tensor(captions)
        self._ends, self._unit_ends = self.images.cumsum(0).tolist(), self.captions.cumsum(0).tolist()
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._owner = os.getpid()
        if len(self) == 0:
            first = self.faults[0][1] if self.faults else f"{self.files[0]} is empty"
            raise ValueError(
                f"no sample in {len(files)} shards, the first of them {self.files[0]} ({first}); expected an image "
                "(.jpg, .png, .webp) and captions (.txt, .json) under each key; check --data"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        shard, row = _place(self._ends, number)
        return f"{self.files[shard]}:{index_of(Path(self.files[shard])).key(row)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files stay in their process

    def find(self, unit: int, every: bool) -> tuple[int, int, int, int]:
        """Return shard, row and image id of a unit, and its caption where each is a unit, else -1."""
        if not every:
            return *_place(self._ends, unit), unit, -1
        number, unit = _place(self._unit_ends, unit)
        row, caption = _place(self.shard(number).ends, unit)
        return number, row, (self._ends[number - 1] if number else 0) + row, caption

    def shard(self, number: int) -> _Open:
        """Return the index and the open file of a shard; each process keeps those it used last."""
        if self._owner != os.getpid():  # a forked worker would move the places of its parent's files
            self._open, self._owner = OrderedDict(), os.getpid()
        if number not in self._open:
            file = Path(self.files[number])
            index = index_of(file)
            if len(index) != int(self.images[number]):
                raise ValueError(
                    f"{file} holds {len(index):,} samples and held {int(self.images[number]):,} when the run began; "
                    "expected shards that stay as they are; start again"
                )
            parts = (index.image, index.text, index.json, index.count.clamp(min=1).cumsum(0))
            self._open[number] = _Open(_Tar(file), *(part.numpy() for part in parts))
            if len(self._open) > OPEN:
                self._open.popitem(last=False)[1].stream.close()
        self._open.move_to_end(number)
        return self._open[number]


def _place(ends: Sequence[int] | np.ndarray, number: int) -> tuple[int, int]:
    """Return in which part a number lies, and where in it."""
    part = bisect_right(ends, number)  # type: ignore[arg-type]  # an array is enough of a sequence
    return part, number - int(ends[part - 1] if part else 0)


class ShardDataset(Pairs):
    """The pairs of shards; captions are read beside their images, so nothing grows with their number."""

    def __init__(self, shards: ShardSet, transform: Transform, *, captions: str = "one", seed: int = 0):
        check_captions(captions)
        self.every = captions == "all"
        super().__init__(shards, shards.captions if self.every else shards.images, transform, seed)
        self.shards, self.faults = shards, shards.faults

    def order(self, seed: int, window: int | None = None, resample: bool = False) -> Order:
        """Return the order of training, near a few shards at a time."""
        return Order(self.groups, seed=seed, window=window, resample=resample)

    def draw(self, unit: int) -> Pair:
        """Return the pair of a unit; one without image or captions has a fault."""
        number, row, image_id, caption = self.shards.find(unit, self.every)
        shard = self.shards.shard(number)
        image: Tensor | None = None
        text = "?"  # a row needs a token, also where it does not count
        try:
            texts = read_captions(shard.stream, shard.text[row], shard.json[row])
            text = texts[int(torch.randint(len(texts), ())) if caption < 0 else caption]
            content = read_member(shard.stream, shard.image[row], "image")
        except (OSError, ValueError) as error:
            fault: Fault | None = ("", f"{type(error).__name__}: {error}")
        else:
            image, fault = read_image(BytesIO(content), self.transform, "tar")
        named = (self.paths[image_id], fault[1]) if fault is not None else None
        return Pair(image, text, image_id, text_number(text), named)


def text_number(text: str) -> int:
    """Return a number of 63 bits that is the same for one text wherever it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
