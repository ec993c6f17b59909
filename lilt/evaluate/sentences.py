"""Lines of text data read as texts, or pairs of them, each with a class or a score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lilt.data.manifest import CAPTION_KEYS, IMAGE_KEYS, captions_of
from lilt.evaluate.columns import check_columns
from lilt.evaluate.labelled import Label, Pattern
from lilt.evaluate.lines import Line

# as GLUE's files (SST-2, CoLA, MRPC, QQP, STS-B, MNLI, QNLI, RTE, WNLI), SICK's and those of the hub have them
PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("#1 String", "#2 String"), ("sentence_A", "sentence_B"),
)  # fmt: skip
TEXTS = tuple(dict.fromkeys(("sentence", "text", *CAPTION_KEYS)))
LABELS = ("label", "gold_label", "is_duplicate", "Quality", "class")
SCORES = ("score", "similarity_score", "relatedness_score", "label")
HIDDEN, DISPUTED = "-1", "-"  # what stands where a label is kept back (GLUE on the hub), where none was agreed (MNLI)
MALFORMED = 0.01  # the share of lines that may be torn


class Sentence(NamedTuple):
    """One text or two, what is said of them, and where it is written, for errors."""

    texts: tuple[str, ...]
    said: Any
    where: str


class Read(NamedTuple):
    """What was read, how many lines say nothing, and how many are torn."""

    sentences: list[Sentence]
    silent: int
    malformed: int


def find_texts(where: str, keys: Sequence[str], text: str | None, pair: str | None) -> tuple[str, ...]:
    """Return the columns of the texts: those that are named, else the first usual pair, else the first usual one."""
    if text is not None or pair is not None:
        if text is None:
            raise ValueError(f"pair={pair} came without text; expected both columns of a pair; give text=… too")
        named = (text,) if pair is None else (text, pair)
        check_columns(where, keys, named, "text= and pair=")
        return named
    usual = [*PAIRS, *((single,) for single in TEXTS)]
    found = next((columns for columns in usual if all(column in keys for column in columns)), None)
    if found is None:
        raise ValueError(
            f"{where} has no column of texts; it has: {', '.join(keys)}; expected {', '.join(TEXTS[:3])} or a pair "
            "such as sentence1 and sentence2; name yours with text=…, and the other of a pair with pair=…"
        )
    return found


def find_column(where: str, keys: Sequence[str], given: str | None, usual: Sequence[str], option: str) -> str:
    """Return the column that is named, else the first usual one."""
    if given is not None:
        check_columns(where, keys, [given], f"{option}=")
    found = given or next((key for key in usual if key in keys), None)
    if found is None:
        raise ValueError(
            f"{where} has no {option}; it has: {', '.join(keys)}; expected a column {' or '.join(usual)}; name yours "
            f"with {option}=…, or a split that has one (GLUE keeps those of its test splits back: use dev)"
        )
    return found


def read_sentences(
    lines: Sequence[Line],
    source: str,
    text: str | None,
    pair: str | None,
    said: Callable[[str, Sequence[str]], Callable[[str, Mapping[str, Any]], Any]],
) -> Read:
    """Read lines; said(source, columns) gives what reads a record's class or score, where None is said of nothing.

    A text column may hold several, such as the captions of an image; each is one. Raises ValueError where more than one
    line in a hundred is torn.
    """
    records = [(line.where, line.record) for line in lines if line.record is not None]
    if not records:
        raise ValueError(f"{source} is empty; expected a text a line; give a file with texts")
    keys = list(records[0][1])
    columns = find_texts(source, keys, text, pair)
    tell = said(source, keys)
    sentences, silent, torn = [], 0, len(lines) - len(records)
    for where, record in records:
        about = tell(where, record)
        if about is None:
            silent += 1
            continue
        found = list(_texts(where, record, columns))
        torn += not found
        sentences += [Sentence(texts, about, where) for texts in found]
    if torn > MALFORMED * len(lines):
        first = next((line.where for line in lines if line.record is None), source)
        raise ValueError(
            f"{first}: {torn} of {len(lines)} lines of {source} have not as many cells as there are headings, or no "
            "text; expected a tab between cells and none inside; mend the file"
        )
    return Read(sentences, silent, torn)


def _texts(where: str, record: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the texts of a record; none where a cell is empty."""
    cells = [record.get(column) for column in columns]
    if any(cell is None or cell == [] or (isinstance(cell, str) and not cell.strip()) for cell in cells):
        return
    several = [captions_of(where, column, cell) for column, cell in zip(columns, cells, strict=True)]
    if len(columns) == 1:
        yield from ((one,) for one in several[0])
    elif all(len(texts) == 1 for texts in several):
        yield tuple(texts[0] for texts in several)
    else:
        raise ValueError(f"{where}: {' and '.join(columns)} hold lists; expected one text each for a pair; mend it")


def kept_back(lines: Mapping[str, Sequence[Line]], source: str, key: str | None) -> frozenset[str]:
    """Return which of -1 and - are no classes in the splits of a source, but stand where a label would.

    - is a class beside +. -1 is one in a split that has other labels too, unless these are names, or numbers from 0 to
    2 or more. Raises ValueError where they are 0 or 1: it may be a third class there, or not.
    """
    said = {split: Counter(_values(some, key)) for split, some in lines.items()}
    others = {value for values in said.values() for value in values} - {HIDDEN, DISPUTED}
    hidden = {HIDDEN, DISPUTED} - ({DISPUTED} if "+" in others else set())
    beside = [split for split, values in said.items() if HIDDEN in values and values.keys() & others]
    numbers = sorted(map(_number, others))
    if beside and all(map(math.isfinite, numbers)) and not (numbers[0] >= 0 and numbers[-1] >= 2):
        if numbers[0] == 0:
            split = beside[0]
            raise ValueError(
                f"{source}: {said[split][HIDDEN]} of {said[split].total()} lines of the split {split!r} have the label "
                f"-1, the others {' or '.join(f'{number:g}' for number in numbers)}; expected it to be a class or a "
                "label that is kept back, and it may be either; write the classes as names, or leave these lines out"
            )
        hidden.remove(HIDDEN)
    return frozenset(hidden)


def _values(lines: Sequence[Line], key: str | None) -> Iterator[str]:
    """Yield the labels of a split as they are written, -1 always as -1."""
    records = [line.record for line in lines if line.record is not None]
    column = key or next((usual for usual in LABELS if records and usual in records[0]), None)
    found = (record.get(column) for record in records) if column is not None else ()
    yield from (_written(value) for value in found if value is not None and value != "")


def _written(given: Any) -> str:
    return HIDDEN if not isinstance(given, bool) and _number(str(given)) == -1 else str(given)


def labels_of(
    key: str | None, pattern: Pattern | None, hidden: Collection[str]
) -> Callable[[str, Sequence[str]], Callable[[str, Mapping[str, Any]], Label | None]]:
    """Return what reads classes: from a column, or from the name of an image by a pattern.

    hidden: the labels that stand for none, of `kept_back`.
    """

    def prepare(source: str, keys: Sequence[str]) -> Callable[[str, Mapping[str, Any]], Label | None]:
        if pattern is None:
            column = find_column(source, keys, key, LABELS, "label")
            return lambda where, record: _label(where, record.get(column), hidden)
        images = find_column(source, keys, None, IMAGE_KEYS, "image")
        return lambda where, record: pattern.find(Path(str(record.get(images) or "")).name)

    return prepare


def _label(where: str, given: Any, hidden: Collection[str]) -> Label | None:
    if given is None or given == "" or _written(given) in hidden:
        return None
    if isinstance(given, bool) or (isinstance(given, float) and given.is_integer()):
        given = int(given)
    if not isinstance(given, (int, str)) or (isinstance(given, str) and _number(given) % 1 > 0):
        raise ValueError(
            f"{where}: label {given!r} is no class; expected a name or a whole number; mend it, name another column "
            "with label=…, or use similarity for scores"
        )
    return given


def scores_of(key: str | None) -> Callable[[str, Sequence[str]], Callable[[str, Mapping[str, Any]], float | None]]:
    """Return what reads scores from a column."""

    def prepare(source: str, keys: Sequence[str]) -> Callable[[str, Mapping[str, Any]], float | None]:
        column = find_column(source, keys, key, SCORES, "score")
        return lambda where, record: _score(where, column, record.get(column))

    return prepare


def _score(where: str, column: str, given: Any) -> float | None:
    if given is None or given == "":
        return None
    number = float(given) if isinstance(given, (int, float)) else _number(str(given))
    if not math.isfinite(number):
        raise ValueError(f"{where}: {column} {given!r} is no number; expected one; mend it, or name another: score=…")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
