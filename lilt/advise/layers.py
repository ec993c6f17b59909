"""What each layer of a tower makes of images or captions, from one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lilt.evaluate.drift import blocks_watched
from lilt.evaluate.rows import Advance, Rows, at_rest, image_rows, text_rows
from lilt.towers import ImageContract, Inputs, Tokens, Tower
from lilt.towers.base import pool_tokens

OUTPUT = "output"


class TowerError(Exception):
    """One tower of several could not be run."""

    def __init__(self, spec: str, reason: str):
        super().__init__(reason)
        self.spec = spec


@dataclass
class Reader:
    """Runs one tower batch by batch, remembers how wide its layers are and how long it took.

    every: its blocks too, and not its output alone.
    """

    tower: Tower
    every: bool
    widths: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    prefix: int = 0

    def __post_init__(self) -> None:
        if not self.every:
            return
        given = self.tower.example()
        with at_rest(self.tower) as device:
            moved = given.to(device) if isinstance(given, Tensor) else {k: v.to(device) for k, v in given.items()}
            self.prefix = self.tower.tokens(moved).prefix

    def read(self, inputs: Inputs) -> Tensor:
        """Return rows (B, W) of all layers side by side."""
        start = perf_counter()
        try:
            layers = self._layers(inputs)
        except (RuntimeError, ValueError) as error:
            raise TowerError(self.tower.spec, f"{type(error).__name__}: {error}") from error
        self.widths = {name: rows.shape[1] for name, rows in layers.items()}
        side_by_side = torch.cat(list(layers.values()), dim=1).float().cpu()
        self.seconds += perf_counter() - start
        return side_by_side

    def _layers(self, inputs: Inputs) -> dict[str, Tensor]:
        if not self.every:
            return {OUTPUT: self.tower(inputs)}
        with blocks_watched(self.tower) as seen:
            output = self.tower(inputs)
            total = len(self.tower.blocks)
            # the last block is the output but for a norm and the tower's own pooling
            some = list(seen.values())[: total - 1]
        mask = None if isinstance(inputs, Tensor) else inputs["attention_mask"].bool()
        pooled = {f"{i} of {total}": pool_block(b, self.tower, mask, self.prefix) for i, b in enumerate(some, 1)}
        return {**pooled, OUTPUT: output}

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Take what was side by side apart, layer by layer."""
        return dict(zip(self.widths, rows.split(list(self.widths.values()), dim=1), strict=True))


def pool_block(block: Tensor, tower: Tower, mask: Tensor | None, prefix: int) -> Tensor:
    """Pool what a block gives, as the tower pools its last; where that is the library's own, by class token or mean."""
    if block.ndim == 4:  # a grid (B, C, H, W) or (B, H, W, C): its sides are equal, mostly
        channels_first = block.shape[2] == block.shape[3] or block.shape[1] != block.shape[2]
        return block.mean((2, 3) if channels_first else (1, 2))
    if block.ndim == 2:
        return block
    how = tower.pool if tower.pool != "own" else "cls" if prefix and tower.side == "vision" else "mean"
    fits = mask is not None and mask.shape == block.shape[:2]
    return pool_tokens(Tokens(block, mask if fits else None, prefix), how)


def read_images(
    readers: Mapping[str, Reader], images: Sequence[str], device: torch.device, advance: Advance, **options: Any
) -> Rows:
    """Open each image once for towers that want it alike; rows (K, …) of all of them stand side by side."""
    contract = next(iter(readers.values())).tower.contract
    assert isinstance(contract, ImageContract)

    def compute(batch: Tensor, _: Tensor) -> Tensor:
        return torch.cat([reader.read(batch) for reader in readers.values()], dim=1)

    with torch.no_grad():
        return image_rows(contract, images, compute, device, advance=advance, **options)


def read_captions(
    reader: Reader, captions: Sequence[str], device: torch.device, advance: Advance, **options: Any
) -> tuple[Tensor, int]:
    """Return rows (N, …) of all layers side by side, and how many captions were cut."""
    tokenizer = reader.tower.contract
    assert not isinstance(tokenizer, ImageContract)

    def compute(tokens: dict[str, Tensor]) -> Tensor:
        advance(len(tokens["input_ids"]))
        return reader.read(tokens)

    with torch.no_grad():
        return text_rows(tokenizer, captions, compute, device, **options)
