"""Captions in several languages: a column for each in a manifest or a dataset, or a file for each beside a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lilt.data import is_table
from lilt.data.hub import read_columns, table_columns
from lilt.data.manifest import IMAGE_KEYS, captions_of, read_records
from lilt.registry import nearest

Cells = dict[str, Any]
Row = tuple[str, Path | str, str | None, Cells]  # place, picture, split, cells by column


@dataclass(frozen=True)
class Columns:
    """The names of columns, written `caption_en|caption_de`."""

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Parse and check them."""
        names = tuple(part.strip() for part in text.split("|"))
        twice = next((name for name in names if names.count(name) > 1), None)
        if "" in names or twice is not None:
            what = "an empty name" if "" in names else f"{twice!r} twice"
            raise ValueError(f"columns={text} has {what}; expected each column once; write caption_en|caption_de")
        return cls(names)


class Told(NamedTuple):
    """One picture and its captions in each column, of which it may have none."""

    image: str
    split: str | None
    captions: dict[str, tuple[str, ...]]


def read_told(source: str | Path, root: str | None, columns: Sequence[str]) -> list[Told]:
    """Read the captions of columns; rows of one picture and split are joined.

    source: a manifest; a dataset `hf:…`; or a .txt file that names one picture a line, with a file of as many lines
    beside it for each column, whose name is the column or ends with it: XTD10's test_1kcaptions_de.txt is `de`.
    Raises ValueError naming the columns there are for one that is not there.
    """
    if isinstance(source, str) and is_table(source):
        check_columns(source, table_columns(source), columns)
        rows: Iterable[Row] = read_columns(source, columns, root)
    elif Path(source).suffix == ".txt":
        rows = _lists(Path(source), root, columns)
    else:
        rows = _manifest(Path(source), root, columns)
    joined: dict[tuple[str, str | None], dict[str, list[str]]] = {}
    for where, image, split, cells in rows:
        mine = joined.setdefault((str(image), split), {column: [] for column in columns})
        for column in columns:
            mine[column] += _captions(where, column, cells.get(column))
    return [
        Told(image, split, {column: tuple(found) for column, found in captions.items()})
        for (image, split), captions in joined.items()
    ]


def check_columns(source: str | Path, known: Sequence[str], wanted: Iterable[str], option: str = "columns=") -> None:
    """Raise ValueError naming the columns there are for one that is not there."""
    for column in wanted:
        if column not in known:
            raise ValueError(
                f"{source} has no column {column!r}; it has: {', '.join(known)}.{nearest(column, known)} Name what it "
                f"has with {option}…"
            )


def _captions(where: str, column: str, given: Any) -> list[str]:
    """Return the captions in a cell; an empty one has none."""
    if given is None or given == [] or (isinstance(given, str) and not given.strip()):
        return []
    return captions_of(where, column, given)


def _manifest(file: Path, root: str | None, columns: Sequence[str]) -> Iterator[Row]:
    records = list(read_records(file))
    keys: dict[str, None] = {}
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: expected an object with image and captions, not {type(record).__name__}; mend it"
            )
        keys |= dict.fromkeys(record)
    check_columns(file, [key for key in keys if key not in (*IMAGE_KEYS, "split")], columns)
    folder = Path(root) if root else file.parent
    named = any(record.get("split") for _, record in records)
    for where, record in records:
        image = next((record[k] for k in IMAGE_KEYS if isinstance(record.get(k), str) and record[k]), None)
        if image is None:
            raise ValueError(
                f"{where}: no image; expected a path under {', '.join(IMAGE_KEYS)}; add one or remove the line"
            )
        yield where, folder / image, str(record.get("split") or "train") if named else None, record


def _lists(names: Path, root: str | None, columns: Sequence[str]) -> Iterator[Row]:
    images = _lines(names)
    whole = {file.stem: file for file in sorted(names.parent.glob("*.txt")) if file != names}
    files = {stem.rpartition("_")[2]: file for stem, file in whole.items()} | whole
    check_columns(names, sorted(files), columns)
    cells: dict[str, list[str]] = {}
    for column in columns:
        ending = [stem for stem in whole if stem.rpartition("_")[2] == column]
        if column not in whole and len(ending) > 1:
            raise ValueError(
                f"{names}: two files are the column {column!r}: {ending[0]}.txt and {ending[1]}.txt; expected one; "
                f"name it as a whole: columns={ending[0]}"
            )
        cells[column] = _lines(files[column])
        if len(cells[column]) != len(images):
            raise ValueError(
                f"{files[column]} has {len(cells[column])} lines and {names} {len(images)}; expected one caption for "
                "each image, in their order; complete one of them"
            )
    folder = Path(root) if root else names.parent
    for number, image in enumerate(images):
        yield f"{names.name} line {number + 1}", folder / image, None, {c: cells[c][number] for c in columns}


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a text file with one image name a line; check data=…")
    # not splitlines: a caption may hold a bare U+2028
    return [line.rstrip("\r") for line in file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
