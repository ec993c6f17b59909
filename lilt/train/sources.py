"""What says the same of an image or a caption each time: frozen fronts, and a teacher of fixed views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lilt.config import TrainConfig
from lilt.data import PairDataset, Pairs, TokenTable, Views, collate_views, make_loader
from lilt.model import Teacher
from lilt.towers import ImageContract, Inputs, Tokenizer
from lilt.towers.base import fingerprint
from lilt.towers.front import Front
from lilt.towers.structure import structure
from lilt.train.address import caption_facts, image_facts
from lilt.train.objectives import parse_objective

ROWS = 64  # computed at a time
OWN_CODE = ("py:", "module:")
Batches = Iterator[tuple[Tensor, Inputs]]  # which items there are (B,), and what they are computed from


@dataclass(frozen=True)
class Source:
    """Something that says the same each time: of how many items, how it is computed, and what tells it apart on disk.

    lengths (count,): of how many tokens each item is, where it is of tokens.
    """

    name: str  # vision, teacher or text
    compute: Callable[[Any], Tensor]
    count: int
    batches: Callable[[list[int]], Batches]
    facts: dict[str, Any] | None  # None: nothing tells it apart
    lengths: Tensor | None = None


def find_sources(
    config: TrainConfig,
    contracts: tuple[ImageContract, Tokenizer],
    fronts: Mapping[str, Front],
    teacher: Teacher | None,
    dataset: Pairs,
    facts: dict[str, Any],
) -> tuple[list[Source], list[str]]:
    """Return what could be stored of a run, a teacher before the tower it teaches, and why the rest cannot."""
    if not isinstance(dataset, PairDataset):
        return [], ["shards are read as they lie and nothing of them is stored"]
    found: list[Source] = []
    reasons: list[str] = []
    if (text := fronts.get("text")) is not None:
        table, tokenizer = dataset.table, contracts[1]
        lengths = table.offsets.diff()
        front = _front_facts(text)
        told = front and {**facts, **front, **caption_facts(dataset, tokenizer)}
        found.append(Source("text", text.record, len(lengths), partial(_captions, table, tokenizer), told, lengths))
    else:
        reasons.append("no block of the text tower stays as it is")
    if dataset.views is None:
        return found, [*reasons, f"augment={config.augment} shows each image anew each time"]
    count = dataset.views * len(dataset.paths)
    batches = partial(_images, dataset, config.workers)
    pixels = image_facts(dataset, contracts[0], config.augment)
    if teacher is not None:
        needs = parse_objective(config.distill).needs
        network = {"fingerprint": fingerprint(teacher.network), "spec": config.teacher, "needs": needs}
        network["structure"] = structure(teacher.network)
        own = str(config.teacher).startswith(OWN_CODE)
        told = None if own or pixels is None else {**facts, **network, **pixels}
        found.append(Source("teacher", teacher, count, batches, told))
    vision = fronts.get("vision")
    if vision is not None and vision.blind:
        front = _front_facts(vision)
        told = front and pixels and {**facts, **front, **pixels}
        found.append(Source("vision", vision.record, count, batches, told))
    else:
        reasons.append("no block of the vision tower stays as it is, or it cannot begin behind those that do")
    return found, reasons


def _captions(table: TokenTable, tokenizer: Tokenizer, items: list[int]) -> Batches:
    """Yield token tensors, captions of like length together."""
    order = table.offsets.diff()[items].argsort(stable=True)
    for part in torch.tensor(items)[order].split(ROWS) if items else ():
        yield part, tokenizer.pad([table[item] for item in part.tolist()])


def _images(dataset: PairDataset, workers: int, items: list[int]) -> Batches:
    """Yield the views that can be read; the dataset is told of those that cannot."""
    options: dict[str, Any] = {"batch_size": ROWS, "collate_fn": collate_views}
    options["generator"] = torch.Generator()  # else the loader draws from the one that dropout uses
    for seen in make_loader(Views(dataset, items), workers if len(items) > ROWS else 0, **options):
        dataset.faults += seen.faults
        if len(seen.images):
            yield seen.rows[seen.good], seen.images


def _front_facts(front: Front) -> dict[str, Any] | None:
    """Return what tells a front apart; None for somebody's own code, which may change while its weights do not."""
    tower = front.tower
    if tower.spec.startswith(OWN_CODE):
        return None
    read = front.last or f"all, pool={tower.pool}"
    told = {"fingerprint": tower.fingerprint, "structure": tower.structure}  # both from before any edit
    return {**told, "spec": tower.spec, "roles": tower.roles, "read": read}
