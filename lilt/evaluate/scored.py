"""Texts with a score, in the parts of a task that learns: what is learned from, chosen by and tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lilt.evaluate.chosen import HELD
from lilt.evaluate.parts import Part
from lilt.evaluate.sentences import Read, read_sentences, scores_of
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Values
from lilt.evaluate.text_parts import OnTextParts
from lilt.evaluate.texts import Texts


class Scored(NamedTuple):
    """What is learned from, chosen by and tested on; how many are left out: tested too, without a score, torn."""

    learn: Part
    check: Part
    test: Part
    also_in_test: int
    silent: int
    malformed: int

    @property
    def items(self) -> list[Texts]:
        """Return the texts of all parts."""
        return [item for part in self[:3] for item in part.items]

    def counts(self) -> Values:
        """Yield how many examples are in each part, and what was left out."""
        for name, part in zip(("train", "validation", "test"), self[:3], strict=True):
            yield f"num_{name}", len(part.items)
        yield "num_also_in_test", self.also_in_test
        yield "num_unscored", self.silent
        yield "num_malformed", self.malformed


@dataclass(frozen=True)
class OnScores(OnTextParts):
    """A task that learns the scores of texts, or of pairs of them; score: their column."""

    score: str | None = None

    def scored(self, subject: Subject) -> Scored:
        """Read and part the data; chosen by is `val` where it is there, else a fifth of the training lines."""
        where, said = self.where(subject), scores_of(self.score)
        read = {
            name: read_sentences(some, f"{where} split {name}", self.text, self.pair, said)
            for name, some in self.lines(subject).items()
        }
        train, queries, *more = (self._part(found, f"{where} split {name}") for name, found in read.items())
        self.check_count(len(queries.items), "texts with a score to test on")
        untested = [part.without(queries) for part in (train, *more)]
        learn, check = self._apart(*untested)
        left_out = sum(len(part.items) for part in (train, *more)) - sum(len(part.items) for part in untested)
        silent, torn = sum(part.silent for part in read.values()), sum(part.malformed for part in read.values())
        return Scored(learn, check, queries, left_out, silent, torn)

    def _part(self, read: Read, where: str) -> Part:
        items, told = self.drawn(read)
        said = torch.tensor(told, dtype=torch.double)
        if len(said.unique()) < 2:
            raise ValueError(
                f"{self.name}: {where} has {len(said.unique())} different scores on {len(said)} lines; expected scores "
                "that differ; name another column with score=…, or a split that has them (GLUE keeps those of its test "
                "split back: use test=dev)"
            )
        return Part(items, said)

    def _apart(self, train: Part, held: Part | None = None) -> tuple[Part, Part]:
        """Return what is learned from and what is chosen by, a fifth unless it is there; nothing is in both."""
        check = _fifth(train) if held is None else held
        learn = train.without(check)
        if len(learn.labels.unique()) < 2 or len(check.labels.unique()) < 2:
            raise ValueError(
                f"{self.name}: {len(learn.items)} lines are left to learn from and {len(check.items)} to choose by, "
                "without those that are tested; expected different scores in each; give more, or name other splits"
            )
        return learn, check


def _fifth(part: Part) -> Part:
    order = torch.randperm(len(part.items), generator=torch.Generator().manual_seed(0))
    some = sorted(order[: round(HELD * len(order))].tolist())
    return Part([part.items[i] for i in some], part.labels[some])
