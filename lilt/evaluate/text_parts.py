"""What tasks that learn from texts share: which splits, and which of their texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lilt.evaluate.chosen import held_split
from lilt.evaluate.lines import Line, read_lines, split_names
from lilt.evaluate.parts import check_apart, some_of
from lilt.evaluate.sentences import Read, Sentence
from lilt.evaluate.subject import Subject
from lilt.evaluate.texts import OnTexts, Texts


@dataclass(frozen=True)
class OnTextParts(OnTexts):
    """A task that learns from one split of texts, chooses on another, by default `val`, and is tested on a third.

    joint: the two texts of a pair go through the tower as one sequence, with what the tokenizer puts between them.
    """

    joint: bool = False
    max_texts: int | None = None  # of each part, drawn at random, always the same
    train: str = "train"
    test: str | None = None
    val: str | None = None

    def lines(self, subject: Subject) -> dict[str, list[Line]]:
        """Return the lines of the training split, the test split, and the validation split, if there is one.

        Raises ValueError for a split that is used twice or not there.
        """
        where, test = self.where(subject), self.test or subject.setting.split
        known = split_names(where)
        held = held_split(self.val, (self.train, test), known)
        names = [self.train, test, *([held] if held else [])]
        check_apart(self.name, names)
        return read_lines(where, names, known)

    def drawn(self, read: Read) -> tuple[list[Texts], list[Any]]:
        """Return the texts of a part as the tower is given them, and what is said of each."""
        some = [read.sentences[i] for i in some_of(len(read.sentences), self.max_texts)]
        return [self._joined(one) if self.joint else one.texts for one in some], [one.said for one in some]

    def _joined(self, one: Sentence) -> Texts:
        if len(one.texts) != 2:
            raise ValueError(
                f"{self.name}: joint=true, and {one.where} has a single text; expected two a line, such as sentence1 "
                "and sentence2; name their columns with text=… and pair=…, or leave joint out"
            )
        return ((one.texts[0], one.texts[1]),)
