"""One row for each image or text, computed once, on all ranks: each does its share and all get the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lilt import distributed
from lilt.data import TokenTable, eval_transform, make_loader, read_image
from lilt.data.transforms import Transform
from lilt.towers import ImageContract, Text, Tokenizer

Advance = Callable[[int], None]
Fault = tuple[str, str]  # path, reason
ImageRows = Callable[[Tensor, Tensor], Tensor]  # images (B, 3, H, W), their numbers (B,) -> rows (B, …)
TextRows = Callable[[dict[str, Tensor]], Tensor]  # token tensors (B, L) -> rows (B, …)


class Rows(NamedTuple):
    """Rows (K, …) of images on the CPU, and which (K,) of all they are, in order; the others could not be read."""

    which: Tensor
    rows: Tensor
    faults: list[Fault]


class _Images(Dataset[tuple[int, Tensor | None, Fault | None]]):
    def __init__(self, paths: Sequence[str], transform: Transform, mine: Sequence[int]):
        self.paths, self.transform, self.mine = paths, transform, mine

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, Fault | None]:
        index = self.mine[place]
        return index, *read_image(self.paths[index], self.transform)


def _stack(items: list[Any]) -> tuple[list[int], Tensor | None, list[Fault]]:
    good = [(i, image) for i, image, _ in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return [i for i, _ in good], images, [fault for _, _, fault in items if fault is not None]


@contextmanager
def at_rest(model: nn.Module) -> Iterator[torch.device]:
    """Give the device of a model, in eval mode and without gradients for a while."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def image_rows(
    contract: ImageContract,
    paths: Sequence[str],
    compute: ImageRows,
    device: torch.device,
    *,
    batch_size: int = 128,
    workers: int = 0,
    advance: Advance = lambda count: None,
) -> Rows:
    """Open each image once, batch by batch, and keep the rows that compute gives for them."""
    mine = range(distributed.rank(), len(paths), distributed.world_size())
    images_of = _Images(paths, eval_transform(contract), mine)
    loader = make_loader(images_of, workers, batch_size=batch_size, collate_fn=_stack)
    numbers, parts, faults = [], [], []
    for indices, images, bad in loader:
        faults += bad
        if images is not None:
            numbers.append(torch.tensor(indices))
            parts.append(compute(images.to(device), numbers[-1].to(device)).cpu())
        advance(len(indices) + len(bad))
    return _joined(numbers, parts, faults)


def text_rows(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    compute: TextRows,
    device: torch.device,
    *,
    batch_size: int = 128,
    max_tokens: int | None = None,
    advance: Advance = lambda count: None,
) -> tuple[Tensor, int]:
    """Return the rows that compute gives for texts, in their order, and how many texts were cut."""
    table = TokenTable(texts, tokenizer, max_tokens)
    # texts of one length together waste no padding
    lengths = table.offsets[1:] - table.offsets[:-1]
    order = torch.argsort(lengths, stable=True)[distributed.rank() :: distributed.world_size()]
    numbers, parts = list(order.split(batch_size)), []
    for chunk in numbers if len(order) else ():
        tokens = tokenizer.pad([table[int(i)] for i in chunk])
        parts.append(compute({k: v.to(device) for k, v in tokens.items()}).cpu())
        advance(len(chunk))
    return _joined(numbers, parts, []).rows, table.cut


def _joined(numbers: list[Tensor], parts: list[Tensor], faults: list[Fault]) -> Rows:
    """Put the shares of all ranks in order; a rank may have none."""
    # whole tensors travel: a row that is a view would take its batch along
    ours = (torch.cat(numbers), torch.cat(parts)) if parts else None
    shares = distributed.gather_objects((ours, faults))
    every = [fault for _, bad in shares for fault in bad]
    full = [share for share, _ in shares if share is not None]
    if not full:
        return Rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), every)
    which, rows = (torch.cat(column) for column in zip(*full, strict=True))
    order = which.argsort()
    return Rows(which[order], rows[order], every)
