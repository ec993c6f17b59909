"""Pictures with a class: a folder for each class, or a manifest with a label in a field or in the file name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from lilt.data.manifest import CAPTION_KEYS, IMAGE_KEYS, read_records
from lilt.registry import nearest

LABEL_KEYS = ("label", "class")
Label = int | str


@dataclass(frozen=True)
class Pattern:
    """A regular expression with one group that finds the label at the start of a file name."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read it, with or without quotes around."""
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        try:
            groups = re.compile(text).groups
        except re.error as error:
            raise ValueError(f"label_from={text} is no regular expression: {error}; write ([a-z]+)_, say") from None
        if groups != 1:
            raise ValueError(f"label_from={text} has {groups} groups; expected one, around the label: ([a-z]+)_")
        return cls(text)

    def find(self, name: str) -> str | None:
        """Return the label in a file name, or None."""
        found = re.match(self.text, name)
        return found[1] if found else None


class Entry(NamedTuple):
    """One picture, what is said of it, and its class; where it was written, for errors."""

    image: str
    texts: tuple[str, ...]
    label: Label
    split: str | None
    where: str


@dataclass(frozen=True)
class Labelled:
    """The entries of a source and how many of its pictures have no label; splits may be named by none."""

    source: str
    entries: list[Entry]
    unlabelled: int = 0

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits; without any the whole is one."""
        return sorted({entry.split for entry in self.entries if entry.split is not None})

    def split(self, name: str, only: bool = False) -> list[Entry]:
        """Return the entries of a split; `train|val` joins several. only: a source without any is one."""
        known = self.splits
        if not known and only:
            return self.entries
        if not known:
            raise ValueError(f"{self.source} names no splits; expected {name!r} among others; add a split to each line")
        wanted = name.split("|")
        for part in wanted:
            if part not in known:
                raise ValueError(
                    f"{self.source} has no split {part!r}; it has: {', '.join(known)}.{nearest(part, known)}"
                )
        return [entry for entry in self.entries if entry.split in wanted]


def read_labelled(
    source: Path, root: str | None = None, key: str | None = None, pattern: Pattern | None = None
) -> Labelled:
    """Read FOLDER/CLASS/picture, FOLDER/SPLIT/CLASS/picture, or a manifest whose records have a label.

    The label is the field key (default: label or class), or what pattern finds in the file name; a picture whose name
    does not fit is left out and counted. Labels that are all whole numbers are read as numbers.
    Raises ValueError naming file and line for what cannot be used.
    """
    if source.is_dir():
        if key is not None or pattern is not None:
            raise ValueError(
                f"{source} is a folder, and its labels are the names of the folders in it; expected neither label nor "
                "label_from; leave them out, or give a manifest"
            )
        entries, unlabelled = list(_folder(source)), 0
    else:
        found = list(_manifest(source, Path(root) if root else source.parent, key, pattern))
        entries = [entry for entry in found if entry is not None]
        unlabelled = len(found) - len(entries)
    if not entries:
        expected = f"file names that {pattern.text} fits" if pattern else "pictures in a folder for each class"
        raise ValueError(f"{source} has no labelled pictures; expected {expected}; check the data")
    return Labelled(str(source), _numbers_as_numbers(entries), unlabelled)


def _folder(source: Path) -> Iterator[Entry]:
    tops = sorted(path for path in source.iterdir() if path.is_dir())
    flat = any(_is_picture(path) for top in tops for path in top.iterdir())
    for top in tops:
        for folder in [top] if flat else sorted(path for path in top.iterdir() if path.is_dir()):
            for path in sorted(folder.rglob("*")):
                if _is_picture(path):
                    yield Entry(str(path), (), folder.name, None if flat else top.name, str(path))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and path.is_file()


def _manifest(source: Path, root: Path, key: str | None, pattern: Pattern | None) -> Iterator[Entry | None]:
    records = [(where, record) for where, record in read_records(source) if _is_record(where, record)]
    named = any(record.get("split") for _, record in records)
    for where, record in records:
        image = next((record[k] for k in IMAGE_KEYS if isinstance(record.get(k), str) and record[k]), "")
        label = pattern.find(Path(image).name) if pattern else _field(where, record, key)
        if label is None:
            yield None
            continue
        split = str(record.get("split") or "train") if named else None
        yield Entry(str(root / image) if image else "", _texts(record), label, split, where)


def _is_record(where: str, record: Any) -> bool:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image and label, not {type(record).__name__}; mend it")
    return True


def _field(where: str, record: Mapping[str, Any], key: str | None) -> Label:
    keys = LABEL_KEYS if key is None else (key,)
    label = next((record[k] for k in keys if record.get(k) not in (None, "")), None)
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        has = ", ".join(map(str, record))
        raise ValueError(
            f"{where}: no label; expected a name or a number under {' or '.join(keys)}, it has {has}; add one, name "
            "the field with label=…, or read it from the file name with label_from=([a-z]+)_"
        )
    return label


def _texts(record: Mapping[str, Any]) -> tuple[str, ...]:
    given = next((record[k] for k in (*CAPTION_KEYS, "sentence") if k in record), ())
    several = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    texts = [item.get("raw") if isinstance(item, dict) else item for item in several]
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


def _numbers_as_numbers(entries: list[Entry]) -> list[Entry]:
    """Read labels as numbers where all are: a table and a folder can only write them as text."""
    whole = [isinstance(entry.label, int) or entry.label.isdecimal() for entry in entries]
    if all(whole):
        return [entry._replace(label=int(entry.label)) for entry in entries]
    number = next((entry for entry in entries if isinstance(entry.label, int)), None)
    if number is not None:
        name = entries[whole.index(False)]
        raise ValueError(
            f"{number.where} has the label {number.label} and {name.where} {name.label!r}; expected numbers or names; "
            "write one kind"
        )
    return entries


def number_labels(entries: Iterable[Entry]) -> dict[Label, int]:
    """Number the labels in their order, from 0."""
    return {label: number for number, label in enumerate(sorted({entry.label for entry in entries}))}  # type: ignore[type-var]


def check_range(entries: Sequence[Entry], classes: int, what: str) -> None:
    """Raise ValueError naming the first label that is no number from 0 to classes - 1."""
    for entry in entries:
        if not isinstance(entry.label, int) or not 0 <= entry.label < classes:
            raise ValueError(
                f"{entry.where}: label {entry.label!r} is out of range; {what} has {classes} classes, expected a "
                f"number from 0 to {classes - 1}; mend the label, or name the field that has it with label=…"
            )
