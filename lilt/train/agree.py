"""Ranks compare what they are about to train before the first step: else they would hang, or learn something odd."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import PurePath

import torch

from lilt import distributed
from lilt.config import TrainConfig
from lilt.data import PairDataset, Pairs
from lilt.model import TwoTower

# where things lie may differ between machines; what lies there is compared
_LOCAL = ("init", "output", "overwrite", "data", "val_data", "image_root", "workers", "price", "spill")
_FIRST = 1000  # images and captions that are looked at

Facts = dict[str, str]


def check_agreement(config: TrainConfig, core: TwoTower, dataset: Pairs) -> None:
    """Raise ValueError on all ranks where they do not train the same, naming the odd ones and what they differ in."""
    if distributed.world_size() == 1:
        return
    everybody = distributed.gather_objects(facts_of(config, core, dataset))
    if told := differences(everybody):
        raise ValueError(
            f"{told}. Expected all ranks to train the same on the same data; give all of them the same settings, and "
            "the same files and library versions on all machines"
        )


def facts_of(config: TrainConfig, core: TwoTower, dataset: Pairs) -> Facts:
    """Return what all ranks have to have in common, in words short enough to be sent around."""
    settings = {f"--{name}": str(value) for name, value in asdict(config).items() if name not in _LOCAL}
    trained = sorted((name, tuple(p.shape)) for name, p in core.trained().items())
    told = {
        "vision weights": core.vision.fingerprint[:12],
        "text weights": core.text.fingerprint[:12],
        "trained tensors": f"{len(trained)} ({_digest(trained)})",
        "batch": f"{config.batch_size} pairs, images {tuple(core.vision.example().shape[1:])}",  # type: ignore[union-attr]
        "pairs": f"{len(dataset)} ({_digest(dataset.groups.tolist())})",
        # folders may be mounted elsewhere
        "images": f"{len(dataset.paths)} ({_digest(PurePath(p).name for p in islice(dataset.paths, _FIRST))})",
        "torch": torch.__version__,
    }
    if isinstance(dataset, PairDataset):  # shards read theirs as they come
        ends = dataset.table.offsets[: _FIRST + 1]
        first = {key: flat[: int(ends[-1])].tolist() for key, flat in dataset.table.flat.items()}
        whose = dataset.texts[:_FIRST]
        told["captions"] = f"{len(dataset.table.offsets) - 1} ({_digest([*ends.tolist(), *first.items(), *whose])})"
    return settings | told


def differences(everybody: list[Facts]) -> str:
    """Say which ranks differ from most of the others (of two, from the first), and in what; "" where none does."""
    counts = Counter(tuple(sorted(facts.items())) for facts in everybody)
    usual = dict(counts.most_common(1)[0][0])
    said = []
    for rank, facts in enumerate(everybody):
        if other := [name for name in {**usual, **facts} if facts.get(name) != usual.get(name)]:
            listed = ", ".join(f"{name} {facts.get(name)} instead of {usual.get(name)}" for name in other)
            said.append(f"rank {rank} differs in {listed}")
    return "; ".join(said)


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item}\n".encode())
    return digest.hexdigest()[:12]
