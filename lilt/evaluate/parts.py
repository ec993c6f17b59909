"""What tasks on labelled data share: where the labels are, and the parts of the data as items and class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilt.evaluate.labelled import Entry, Label, Labelled, Pattern, number_labels, read_labelled
from lilt.evaluate.rows import Rows
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values

SIDES = ("vision", "text")


class Part(NamedTuple):
    """Image paths, texts or pairs of texts, and the class number (N,) of each."""

    items: list[Any]
    labels: Tensor

    def without(self, other: Part) -> Part:
        """Return what is not also in another part."""
        there = set(other.items)
        kept = [i for i, item in enumerate(self.items) if item not in there]
        return Part([self.items[i] for i in kept], self.labels[kept])


class Known(NamedTuple):
    """Features (N, W) and classes (N,) of what could be read of a part."""

    features: Tensor
    labels: Tensor

    def on(self, device: torch.device) -> Known:
        """Move both; mps has no float64, in which features are compared."""
        target = torch.device("cpu") if device.type == "mps" else device
        return Known(self.features.to(target), self.labels.to(target))


@dataclass(frozen=True)
class OnLabels(OnData):
    """A task on labelled data: the label is a field, or what label_from finds at the start of the file name."""

    label: str | None = None
    label_from: Pattern | None = None
    max_images: int | None = None  # of each part, drawn at random, always the same

    def labelled(self, subject: Subject) -> Labelled:
        """Read the data."""
        source, root = self.source(subject)
        return read_labelled(source, root, self.label, self.label_from)

    def part(self, entries: Sequence[Entry], number: Mapping[Label, int], side: str = "vision") -> Part:
        """Return a part of the data as a tower of one side sees it: each picture, or each text, once with its class."""
        if side == "text":
            pairs = {(text, number[entry.label]) for entry in entries for text in entry.texts}
            lacking = next((entry for entry in entries if not entry.texts), None)
        else:
            pairs = {(entry.image, number[entry.label]) for entry in entries}
            lacking = next((entry for entry in entries if not entry.image), None)
        if lacking is not None:
            what = "text" if side == "text" else "image"
            raise ValueError(f"{lacking.where}: no {what}; {self.name} looks at the {side} tower and needs one; add it")
        ordered = sorted(pairs)
        ordered = [ordered[i] for i in some_of(len(ordered), self.max_images)]
        return Part([item for item, _ in ordered], torch.tensor([label for _, label in ordered], dtype=torch.long))

    def check_any(self, rows: Rows, items: Sequence[str]) -> None:
        """Raise ValueError where nothing could be read."""
        if len(rows.which) == 0:
            first = f" (first: {rows.faults[0]})" if rows.faults else ""
            raise ValueError(
                f"{self.name}: none of the {len(items)} images could be read{first}; expected image files; check "
                "image_root"
            )

    def counts(self, rows: Rows, labelled: Labelled) -> Values:
        """Yield what could not be evaluated, then raise where that leaves fewer than expected."""
        yield "num_unreadable", len(rows.faults)
        yield "num_unlabelled", labelled.unlabelled
        self.check_count(len(rows.which), "readable images")


class Drawn(NamedTuple):
    """The parts of a task that learns; held is None where the data has none to choose by."""

    train: Part
    test: Part
    held: Part | None
    classes: int
    also_in_test: int  # how many were left out of train and held for it


@dataclass(frozen=True)
class Trained(OnLabels):
    """A task that learns from the features of one part and is tested on those of another, of either tower."""

    side: str = "vision"
    train: str = "train"
    test: str | None = None

    def draw(self, subject: Subject, labelled: Labelled, held: str | None = None) -> Drawn:
        """Return the parts; what is also in the test part is left out of the others."""
        if self.side not in SIDES:
            raise ValueError(f"{self.name}: side={self.side}; expected vision or text; choose the tower")
        names = [self.train, self.test or subject.setting.split, *([held] if held else [])]
        check_apart(self.name, names)
        number = number_labels(labelled.entries)
        train, test, *more = (self.part(labelled.split(name), number, self.side) for name in names)
        self.check_count(len(test.items), f"labelled {'images' if self.side == 'vision' else 'texts'} to test on")
        return draw_apart(self.name, labelled.source, names, [train, test, *more], number, labelled.unlabelled)

    def know(self, subject: Subject, name: str, part: Part) -> tuple[Known, Rows]:
        """Return the features of a part."""
        rows = subject.features(self.side, f"{self.name}: {name}", part.items)
        self.check_any(rows, part.items)
        return Known(rows.rows, part.labels[rows.which]).on(subject.device), rows


def draw_apart(
    task: str, source: str, names: Sequence[str], parts: Sequence[Part], number: Mapping[Label, int], unlabelled: int
) -> Drawn:
    """Return the parts (train, test, and held where there is one), by their names in the source; what is also in the
    test part is left out of the others. Raises ValueError where that leaves nothing, or one class, to learn from."""
    train, test, *more = parts
    kept = [part.without(test) for part in (train, *more)]
    for name, part in zip([names[0], *names[2:]], kept, strict=True):
        if not part.items:
            raise ValueError(
                f"{task}: everything in the split {name!r} of {source} is in {names[1]!r} too; expected something else "
                "to learn from; name another split"
            )
    learned = kept[0].labels.unique().tolist()
    if len(learned) == 1:
        label = next(label for label, place in number.items() if place == learned[0])
        raise ValueError(
            f"{task}: the split {names[0]!r} of {source} has one class ({label!r}, of {len(kept[0].items)} examples), "
            f"and {unlabelled} lines of the data are without a label; expected two classes or more; name another "
            "column with label=…, or give data that have them"
        )
    left_out = sum(len(part.items) for part in (train, *more)) - sum(len(part.items) for part in kept)
    return Drawn(kept[0], test, kept[1] if more else None, len(set(number.values())), left_out)


def some_of(count: int, most: int | None) -> list[int]:
    """Return the numbers of at most so many of count things, drawn at random, always the same, in their order."""
    if most is None or most >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].tolist())


def check_apart(task: str, names: Sequence[str]) -> None:
    """Raise ValueError where a split is used twice."""
    single = [part for name in names for part in name.split("|")]
    twice = next((part for part in single if single.count(part) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{task}: the split {twice!r} is used twice ({', '.join(names)}); what is tested must not be learned from "
            "or selected by; name different splits"
        )
