"""Show the pairs to the towers, and keep what is needed to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lilt.advise.advice import Failed
from lilt.advise.layers import Reader, TowerError, read_captions, read_images
from lilt.advise.pairs import Chosen
from lilt.advise.question import Question
from lilt.advise.view import View
from lilt.evaluate.rows import Advance, Fault, Rows
from lilt.towers import ImageContract, Tower
from lilt.towers.meta import without_weights

FAULTS = (ValueError, OSError, RuntimeError, TowerError)


@dataclass(frozen=True)
class Looked:
    """What is kept of a tower: how its layers see the pairs, its shape on the meta device, milliseconds for one."""

    views: Mapping[str, View]
    bare: Tower
    ms: float

    @classmethod
    def of(cls, reader: Reader, rows: Tensor, seen: int, k: int) -> Looked:
        """Keep the rows (N, …) of a tower that took its time for `seen` things."""
        views = {name: View.of(name, part, k) for name, part in reader.split(rows).items()}
        return cls(views, without_weights(reader.tower), 1000 * reader.seconds / max(1, seen))


def alike(towers: Mapping[str, Tower]) -> list[dict[str, Tower]]:
    """Return vision towers in groups that want their images alike."""
    groups: dict[object, dict[str, Tower]] = {}
    for spec, tower in towers.items():
        asks = tower.contract
        assert isinstance(asks, ImageContract)
        # libraries give these as lists or tuples
        colours = tuple(asks.mean), tuple(asks.std)
        key = (asks.image_px, colours, asks.interpolation, asks.crop, asks.transform)
        groups.setdefault(key, {})[spec] = tower
    return list(groups.values())


@dataclass
class Looker:
    """Runs towers on a device; failed are those that could not be run, faults the images that could not be read."""

    question: Question
    device: torch.device
    failed: list[Failed]
    faults: list[Fault]

    def at_images(
        self, towers: Mapping[str, Tower], pairs: Chosen, advance: Advance
    ) -> tuple[dict[str, Looked], Chosen]:
        """Show each image once to all towers that want it alike; what only some could read is left out for all."""
        groups = []
        for some in alike(towers):
            readers, rows = self._read(some, pairs, advance)
            if readers:
                groups.append((readers, rows))
        known = reduce(set.intersection, (set(rows.which.tolist()) for _, rows in groups), set(range(len(pairs))))
        first = f" (first fault: {self.faults[0]})" if self.faults else ""
        self.question.check_enough(len(known), f"{len(known)} of {len(pairs)} images could be read{first}")
        looked = {}
        for readers, rows in groups:
            kept = torch.tensor([i in known for i in rows.which.tolist()])
            shares = rows.rows[kept].split([sum(reader.widths.values()) for reader in readers.values()], dim=1)
            for (spec, reader), share in zip(readers.items(), shares, strict=True):
                try:
                    looked[spec] = Looked.of(reader, share, len(rows.which), self.question.k)
                except FAULTS as error:
                    self.failed.append(Failed(spec, str(error)))
        # in the order they were given, whoever shares images with whom
        return {spec: looked[spec] for spec in towers if spec in looked}, pairs.only(sorted(known))

    def _reader(self, spec: str, tower: Tower) -> Reader | None:
        try:
            return Reader(tower.eval(), self.question.layers == "all")
        except FAULTS as error:
            self.failed.append(Failed(spec, str(error)))
            return None

    def _read(self, towers: Mapping[str, Tower], pairs: Chosen, advance: Advance) -> tuple[dict[str, Reader], Rows]:
        """Run towers on all images; after one failed, the others once more from the start."""
        made = {spec: self._reader(spec, tower) for spec, tower in towers.items()}
        readers = {spec: reader for spec, reader in made.items() if reader is not None}
        options = {"batch_size": self.question.batch_size, "workers": self.question.workers}
        while readers:
            for reader in readers.values():
                reader.seconds = 0.0
            try:
                rows = read_images(readers, pairs.images, self.device, advance, **options)
            except TowerError as error:
                self.failed.append(Failed(error.spec, str(error)))
                del readers[error.spec]
                continue
            self.faults += [fault for fault in rows.faults if fault not in self.faults]
            return readers, rows
        return {}, Rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), [])

    def at_captions(self, spec: str, tower: Tower, pairs: Chosen, advance: Advance) -> Looked | None:
        """Show each caption once to a text tower; None where it failed."""
        reader = self._reader(spec, tower)
        if reader is None:
            return None
        options = {"batch_size": self.question.batch_size, "max_tokens": self.question.text_tokens}
        try:
            rows, _ = read_captions(reader, pairs.captions, self.device, advance, **options)
            return Looked.of(reader, rows, len(pairs), self.question.k)
        except FAULTS as error:
            self.failed.append(Failed(spec, str(error)))
            return None
