"""Texts with a class, in the parts of a task that learns: where the class is, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lilt.evaluate.chosen import Learned, learn_from
from lilt.evaluate.labelled import Label, Pattern
from lilt.evaluate.parts import Part, draw_apart
from lilt.evaluate.sentences import Read, kept_back, labels_of, read_sentences
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values
from lilt.evaluate.text_parts import OnTextParts
from lilt.evaluate.texts import Texts


class Classed(NamedTuple):
    """What is learned from, chosen by and tested on, and how many lines say nothing or are torn."""

    learned: Learned
    silent: int
    malformed: int

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """Return what is learned from, what is chosen by, and the test part."""
        return self.learned.train, self.learned.held, self.learned.drawn.test

    @property
    def items(self) -> list[Texts]:
        """Return the texts of all parts."""
        return [item for part in self.parts for item in part.items]

    def counts(self) -> Values:
        """Yield how many examples are in each part, and what was left out."""
        for name, part in zip(("train", "validation", "test"), self.parts, strict=True):
            yield f"num_{name}", len(part.labels)
        yield from self.learned.counts()
        yield "num_unlabelled", self.silent
        yield "num_malformed", self.malformed


@dataclass(frozen=True)
class OnClasses(OnTextParts):
    """A task that learns the classes of texts; the class is in a column, or in the name of the image of a caption."""

    label: str | None = None
    label_from: Pattern | None = None

    def classed(self, subject: Subject) -> Classed:
        """Read and part the data; every line of the test split counts, as often as it is there."""
        where, lines = self.where(subject), self.lines(subject)
        names = list(lines)
        hidden = kept_back(lines, str(where), self.label) if self.label_from is None else ()
        said = labels_of(self.label, self.label_from, hidden)
        read = [
            read_sentences(some, f"{where} split {name}", self.text, self.pair, said) for name, some in lines.items()
        ]
        for name, found in zip(names, read, strict=True):
            if not found.sentences:
                raise ValueError(
                    f"{self.name}: no line of the split {name!r} of {where} has a label; expected a class in each; "
                    "name another split"
                )
        number = number_classes(read)
        check_known(read, names)
        parts = [self._part(found, number) for found in read]
        self.check_count(len(parts[1].items), "labelled texts to test on")
        silent, torn = sum(found.silent for found in read), sum(found.malformed for found in read)
        drawn = draw_apart(self.name, str(where), names, parts, number, silent)
        return Classed(learn_from(drawn, self.name, "texts"), silent, torn)

    def _part(self, read: Read, number: Mapping[Label, int]) -> Part:
        items, said = self.drawn(read)
        return Part(items, torch.tensor([number[label] for label in said], dtype=torch.long))


def number_classes(read: Sequence[Read]) -> dict[Label, int]:
    """Number the classes in their order, from 0; where all are whole numbers, in the order of numbers."""
    found = {one.said for part in read for one in part.sentences}
    whole = all(isinstance(label, int) or label.isdecimal() for label in found)
    key = int if whole else str
    places = {place: number for number, place in enumerate(sorted({key(label) for label in found}))}
    return {label: places[key(label)] for label in found}


def check_known(read: Sequence[Read], names: Sequence[str]) -> None:
    """Raise ValueError naming the first class that the first part has no example of."""
    learned = {str(one.said) for one in read[0].sentences}
    for part, name in zip(read[1:], names[1:], strict=True):
        for one in part.sentences:
            if str(one.said) not in learned:
                raise ValueError(
                    f"{one.where}: label {one.said!r} of the split {name!r} is out of range; the split {names[0]!r} "
                    f"has {_some(sorted(learned))}; expected one of them; mend the label, or learn from a split with it"
                )


def _some(labels: Sequence[str], most: int = 8) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")
