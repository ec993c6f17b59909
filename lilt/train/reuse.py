"""What a frozen front or a teacher says of each image and caption: computed once, stored, and trained from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lilt import distributed
from lilt.config import TrainConfig
from lilt.data import Collate, PairDataset, Pairs, Store
from lilt.data.store import shared_free
from lilt.memory import available
from lilt.model import Teacher, TwoTower
from lilt.towers import Inputs
from lilt.towers.find_front import find_front
from lilt.towers.front import Front
from lilt.train.address import folder_of
from lilt.train.kernels import quick_attention
from lilt.train.log import RunLog
from lilt.train.sources import Source, find_sources

REUSE = ("auto", "off", "memory", "disk")
HOW = {"memory": "kept in memory", "disk": "kept on disk"}
READ = 500e6  # bytes a second that a disk is trusted to read
MEMORY_SHARE, SHARED_SHARE, DISK_SHARE = 0.25, 0.5, 0.5  # of what is free, that auto takes


@dataclass(frozen=True)
class Probe:
    """What a few items of a source showed: shape and type of what is stored of one, seconds and bytes it takes."""

    shape: tuple[int, ...]
    gives: torch.dtype
    lengths: Tensor | None
    seconds: float
    bytes: float


def find_fronts(core: TwoTower) -> dict[str, Front]:
    """Return the frozen front of each tower that has one; from now on it is in eval mode in training too."""
    tokens = core.shared.reads_tokens or core.projection.reads_tokens
    found = {}
    for tower in (core.vision, core.text):
        front = find_front(tower, tokens)
        if front is not None:
            tower.still = front.still
            found[tower.side] = front
    return found


def check_reuse(config: TrainConfig, core: TwoTower, teacher: Teacher | None, dataset: Pairs) -> None:
    """Raise ValueError, before anything is evaluated, for reuse that was asked for and cannot be had."""
    if config.reuse not in ("off", "auto"):
        asked_for(config, core, find_fronts(core), teacher, dataset, {})


def asked_for(
    config: TrainConfig,
    core: TwoTower,
    fronts: Mapping[str, Front],
    teacher: Teacher | None,
    dataset: Pairs,
    facts: dict[str, Any],
) -> list[Source]:
    """Return what can be stored. Raises ValueError where memory or disk was asked for, and there is nothing for it."""
    contracts: Any = core.vision.contract, core.text.contract
    sources, reasons = find_sources(config, contracts, fronts, teacher, dataset, facts)
    if not sources and config.reuse != "auto":
        raise ValueError(
            f"reuse={config.reuse}: {'; '.join(reasons)}; expected a frozen front or a teacher, and images that look "
            "the same each time; use --reuse off, or --augment none or --views 4 and a policy such as last(2)"
        )
    for source in sources:
        if source.facts is None and config.reuse == "disk":
            raise ValueError(
                f"reuse=disk: nothing tells whether a later run has the same {source.name} tower and preprocess, since "
                "one of them is code of your own; expected a library's tower and a described preprocess; pass "
                "lilt.ImageContract(image_px=…, mean=…, std=…) in place of a callable, or use reuse=memory"
            )
    return sources


class Reuse:
    """Fills stores with what is frozen, and lets batches be read from them.

    pairs: how many the training will see. Where there is something to choose the main process chooses.
    """

    def __init__(
        self,
        config: TrainConfig,
        core: TwoTower,
        fronts: Mapping[str, Front],
        teacher: Teacher | None,
        accelerator: Accelerator,
        log: RunLog,
        pairs: int,
    ):
        self.config, self.core, self.fronts, self.teacher = config, core, fronts, teacher
        self.accelerator, self.log, self.pairs = accelerator, log, pairs
        self.dtype = config.reuse_dtype or ("fp32" if config.precision == "no" else config.precision)

    def start(self, dataset: Pairs, collate: Collate) -> None:
        """Store what pays, or what was asked for. Raises ValueError where that is nothing."""
        if self.config.reuse == "off":
            return
        facts = {"precision": self.config.precision, "dtype": self.dtype, "device": self.accelerator.device.type}
        for source in asked_for(self.config, self.core, self.fronts, self.teacher, dataset, facts):
            if source.name == "vision" and self.teacher is not None and "teacher" not in collate.stores:
                break  # the teacher needs the image
            with self._quiet():
                probe = self._probe(source)
                place = distributed.gather_objects(self._place(source, probe))[0]
                if place is not None:
                    store = self._store(source, probe, place)
                    if store.folder:
                        self.log.say(f"{source.name}: rows are in {store.folder}, for later runs too")
                    collate.stores[source.name] = self._fill(source, store)
        collate.images = len(dataset.paths)
        if isinstance(dataset, PairDataset):
            dataset.opens = "vision" not in collate.stores

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Compute as evaluation does, in the precision of training."""
        training = self.core.training
        try:
            self.core.eval()
            with torch.no_grad(), self.accelerator.autocast(), quick_attention(self.accelerator):
                yield
        finally:
            self.core.train(training)

    def _probe(self, source: Source) -> Probe:
        """Compute the first few items that can be read, twice: the first time is not like the others."""
        parts = (list(range(start, min(start + 8, source.count))) for start in range(0, source.count, 8))
        items, inputs = next((read for part in parts for read in source.batches(part)), (None, None))
        if items is None or inputs is None:
            raise ValueError(
                f"none of the {source.count:,} images of the training set can be read; expected image files; check "
                "--image_root"
            )
        inputs = self._moved(inputs)
        rows = source.compute(inputs)
        began = time.perf_counter()
        rows = source.compute(inputs)
        rows.sum().item()  # waits for the device
        seconds = (time.perf_counter() - began) / len(rows)
        shape, lengths = tuple(rows.shape[1:]), source.lengths
        # a tower as a whole gives one row, and some tokenizers pad to a length of their own
        if rows.ndim < 3 or lengths is None or int(lengths[items].max()) != rows.shape[1]:
            lengths = None
        else:
            shape = shape[1:]
        size = Store.size(source.count, shape, self.dtype, lengths)
        return Probe(shape, rows.dtype, lengths, seconds, size / source.count)

    def _place(self, source: Source, probe: Probe) -> str | None:
        """Return memory, disk, or None where computing anew is better; said in the log."""
        size, kind = probe.bytes * source.count, "caption" if source.name == "text" else "image"
        place: str | None = self.config.reuse
        if place == "auto":
            if self.pairs <= source.count:
                return None  # most items would come once
            place = self._best(source, probe, size)
        self.log.say(
            f"{source.name}: {HOW[place] if place else 'storing does not pay'}: {probe.bytes:,.0f} bytes a "
            f"{kind}, {size / 2**20:,.1f} MiB together, instead of {1e3 * probe.seconds:.2f} ms each"
        )
        return place

    def _best(self, source: Source, probe: Probe, size: float) -> str | None:
        if distributed.world_size() == 1 and size < self._room():
            return "memory"
        if source.facts is None or probe.bytes / READ > probe.seconds:
            return None
        folder = folder_of(source.facts).parent
        folder.mkdir(parents=True, exist_ok=True)
        return "disk" if size < DISK_SHARE * shutil.disk_usage(folder).free else None

    def _room(self) -> float:
        """Return the bytes of memory that a store may take."""
        shared = shared_free() if self.config.workers else None  # without workers nothing is shared
        room = MEMORY_SHARE * available()
        return room if shared is None else min(room, SHARED_SHARE * shared)

    def _store(self, source: Source, probe: Probe, place: str) -> Store:
        folder: Path | None = None
        if place == "disk":
            assert source.facts is not None
            folder = folder_of(source.facts)
        shared = self.config.workers > 0
        return Store(folder, source.count, probe.shape, self.dtype, probe.lengths, probe.gives, shared)

    def _fill(self, source: Source, store: Store) -> Store:
        """Compute what is not known, each rank its share."""
        missing = store.missing()
        if store.folder:
            # the processes of one machine share its disk, and by the time that the last looks, the first has put rows
            missing = distributed.gather_objects(missing)[distributed.rank() - distributed.local_rank()]
        ours = _share(missing) if store.folder else missing
        bar = self.log.bar(f"storing: {source.name}", len(ours))
        done = 0
        for items, inputs in source.batches(ours.tolist()):
            store.put(items, source.compute(self._moved(inputs)))
            done += len(items)
            self.log.move(bar, done)
        self.log.close(bar)
        distributed.barrier()
        return store

    def _moved(self, inputs: Inputs) -> Inputs:
        device = self.accelerator.device
        return inputs.to(device) if isinstance(inputs, Tensor) else {k: v.to(device) for k, v in inputs.items()}


def _share(items: Tensor) -> Tensor:
    """Return this process' part of what those of its machine share."""
    return items[distributed.local_rank() :: distributed.local_world_size()]
