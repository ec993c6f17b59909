"""Examples to learn from: pictures, or texts and pairs of them, drawn by keys (epoch, number) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lilt.data import TokenTable, read_image, train_transform
from lilt.data.order import Key, draw_seed
from lilt.evaluate.parts import Part
from lilt.towers import ImageContract, Inputs, Tokenizer

Encoding = dict[str, list[int]]
Example = tuple[list[Tensor] | list[Encoding], float]  # one input, the two of a pair, or none; its class or score


class Batch(NamedTuple):
    """What a tower is given, twice for a pair, and the class or score of each row (B,).

    inputs is empty where none was read.
    """

    inputs: list[Inputs]
    labels: Tensor


class Pictures(Dataset[Example]):
    """Pictures, augmented anew in each epoch; one that cannot be read has no input."""

    inputs = 1

    def __init__(self, part: Part, contract: ImageContract, augment: str, seed: int):
        self.part, self.seed = part, seed
        self.transform = train_transform(contract, augment)

    def __len__(self) -> int:
        return len(self.part.items)

    def __getitem__(self, key: Key) -> Example:
        epoch, number = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.seed, epoch, number))
            image, _ = read_image(self.part.items[number], self.transform)
        return [] if image is None else [image], self.part.labels[number].item()


class Encoded(Dataset[Example]):
    """Texts or pairs of them; each is encoded once."""

    def __init__(self, part: Part, tokenizer: Tokenizer, max_tokens: int | None):
        texts = sorted({text for item in part.items for text in item})
        self.part, self.number = part, {text: i for i, text in enumerate(texts)}
        self.table = TokenTable(texts, tokenizer, max_tokens)
        self.inputs = len(part.items[0])

    def __len__(self) -> int:
        return len(self.part.items)

    def __getitem__(self, key: Key) -> Example:
        _, number = key
        return [self.table[self.number[text]] for text in self.part.items[number]], self.part.labels[number].item()


class Collate:
    """Turn examples into a batch; a class, so that spawned workers can receive it. pad: of a tokenizer, for texts."""

    def __init__(self, pad: Callable[[Sequence[Encoding]], dict[str, Tensor]] | None = None):
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> Batch:
        read = [(inputs, label) for inputs, label in examples if inputs]
        columns: list = list(zip(*(inputs for inputs, _ in read), strict=True))
        join = torch.stack if self.pad is None else self.pad
        return Batch([join(list(column)) for column in columns], torch.tensor([label for _, label in read]))
