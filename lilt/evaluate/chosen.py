"""Tasks that choose something on a held-out part: a split of its own, or a share of what is learned from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lilt.evaluate.labelled import Labelled
from lilt.evaluate.parts import Drawn, Part, Trained
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values

HELD = 0.2
VALIDATION = "val"


class Learned(NamedTuple):
    """What is learned from, what is chosen by, and all that was drawn."""

    train: Part
    held: Part
    drawn: Drawn

    def counts(self) -> Values:
        """Yield how many classes there are, and how many examples were left out as they are tested."""
        yield "num_classes", self.drawn.classes
        yield "num_also_in_test", self.drawn.also_in_test


@dataclass(frozen=True)
class Chosen(Trained):
    """A task that learns from images and chooses on the split val, by default `val`, or on a share of each class."""

    val: str | None = None

    def learned(self, subject: Subject, labelled: Labelled) -> Learned:
        """Return what is learned from, what is chosen by, and the test part; nothing is in two of them."""
        held = held_split(self.val, (self.train, self.test or subject.setting.split), labelled.splits)
        what = "images" if self.side == "vision" else "texts"
        return learn_from(self.draw(subject, labelled, held), self.name, what)


def held_split(given: str | None, used: Collection[str], known: Collection[str]) -> str | None:
    """Return the validation split: the one given, or `val` where it is there and not used otherwise."""
    own = VALIDATION in known and VALIDATION not in "|".join(used).split("|")
    return given or (VALIDATION if own else None)


def learn_from(drawn: Drawn, name: str, what: str) -> Learned:
    """Return the training part without what is held out; where nothing is, a share of each class is."""
    train, held = (drawn.train, drawn.held) if drawn.held else hold_out(drawn.train, name, what)
    return Learned(train.without(held), held, drawn)


def hold_out(part: Part, name: str = "probe", what: str = "images", share: float = HELD) -> tuple[Part, Part]:
    """Split a part at random, the same way each time, so that each class of two or more is in both."""
    generator = torch.Generator().manual_seed(0)
    held: list[int] = []
    for label in part.labels.unique():
        places = (part.labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(places))), len(places) - 1)
        held += places[torch.randperm(len(places), generator=generator)[:count]].tolist()
    if not held:
        raise ValueError(
            f"{name}: {len(part.items)} training {what} leave none to choose by; expected at least two of a class; "
            "give more, or name a validation split with val=…"
        )
    kept = sorted(set(range(len(part.items))) - set(held))
    kept_part, held_part = (Part([part.items[i] for i in some], part.labels[some]) for some in (kept, sorted(held)))
    return kept_part, held_part
