"""Pairs of image and caption, drawn by keys (epoch, index) alone: nothing depends on workers, ranks or restarts."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lilt.data.manifest import Sample
from lilt.data.transforms import Transform
from lilt.towers.base import Tokenizer

Key = tuple[int, int]  # epoch, index


class TokenTable:
    """The encodings of many captions, made once, in flat int32 tensors that worker processes share."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int | None = None):
        encodings, self.cut = tokenizer.encode(texts, max_tokens) if texts else ([], 0)
        lengths = torch.tensor([0] + [len(e["input_ids"]) for e in encodings])
        self.offsets = lengths.cumsum(0)
        keys = encodings[0].keys() if encodings else []
        self.flat = {k: torch.tensor([v for e in encodings for v in e[k]], dtype=torch.int32) for k in keys}

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return {key: flat[start:stop].tolist() for key, flat in self.flat.items()}


@dataclass(frozen=True)
class Pair:
    """One image tensor (3, H, W), or None and why; one encoded caption; which image and which text these are."""

    image: Tensor | None
    tokens: dict[str, list[int]]
    image_id: int
    text_id: int
    fault: tuple[str, str] | None = None


class PairDataset(Dataset[Pair]):
    """Draws the pair of a key: the image, augmented by the key's own seed, and one of its captions.

    captions="one" has one index an image and picks a caption each epoch; "all" has one index a caption.
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
    ):
        if captions not in ("one", "all"):
            raise ValueError(
                f"captions={captions!r}; expected 'one' (a random one per image and epoch) or 'all'; choose one"
            )
        texts = sorted({c for s in samples for c in s.captions})
        number = {text: i for i, text in enumerate(texts)}
        self.paths = [str(s.image) for s in samples]
        self.texts = [[number[c] for c in s.captions] for s in samples]
        self.table = TokenTable(texts, tokenizer, max_tokens)
        self.transform = transform
        self.seed = seed
        self.every = (
            [(i, c) for i, ids in enumerate(self.texts) for c in range(len(ids))] if captions == "all" else None
        )

    def __len__(self) -> int:
        return len(self.every) if self.every is not None else len(self.paths)

    def __getitem__(self, key: Key) -> Pair:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # the CPU generator alone: torch.manual_seed would also restart the dropout of an accelerator
            torch.default_generator.manual_seed(draw_seed(self.seed, epoch, index))
            if self.every is not None:
                image_id, caption = self.every[index]
            else:
                image_id, caption = index, int(torch.randint(len(self.texts[index]), ()))
            text_id = self.texts[image_id][caption]
            image, fault = read_image(self.paths[image_id], self.transform)
        return Pair(image, self.table[text_id], image_id, text_id, fault)


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """Mix three numbers into one seed (a 63-bit linear congruence; neighbours must not share a stream)."""
    mixed = seed
    for part in (epoch, index):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def open_image(path: str | Path) -> Image.Image:
    """Open, decode and turn upright as RGB."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_image(path: str, transform: Transform) -> tuple[Tensor | None, tuple[str, str] | None]:
    """Return the transformed image, or None and (path, reason) when it cannot be read."""
    try:
        picture = open_image(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, (path, f"{type(error).__name__}: {error}")
    return transform(picture), None


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a group, to the main process; for data workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches(Sampler[list[Key]]):
    """Yields this rank's rows of each global batch, epoch after epoch, without an end; starts at any step.

    A global batch is the same set of pairs in the same order whatever the number of ranks. The last incomplete batch of
    an epoch is dropped; a set smaller than one batch is one batch.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1, seed: int = 0, start: int = 0):
        batch = min(batch_size, count)
        batch -= batch % world
        if batch == 0:
            raise ValueError(
                f"batch_size={batch_size} on {count} pairs leaves no pair for each of {world} processes; use fewer "
                "processes, a larger batch or more data"
            )
        self.count, self.batch, self.rank, self.world, self.seed, self.start = count, batch, rank, world, seed, start
        self.steps_per_epoch = count // batch

    def __iter__(self) -> Iterator[list[Key]]:
        step, ours = self.start, self.batch // self.world
        while True:
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == self.start or place == 0:
                order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            first = place * self.batch + self.rank * ours
            yield [(epoch, index) for index in order[first : first + ours]]
            step += 1
