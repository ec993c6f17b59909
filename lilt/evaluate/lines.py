"""Lines of text data by split: a folder of files as GLUE has them, one file, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lilt.data import is_table
from lilt.data.hub import read_rows
from lilt.data.manifest import read_records
from lilt.registry import nearest

ENDINGS = (".tsv", ".csv", ".jsonl", ".json")
# CoLA's files have no headings: where it is from, acceptable or not, the author's own mark, the sentence
COLA = ("source", "label", "mark", "sentence")


class Line(NamedTuple):
    """One record, None where it has more or fewer cells than there are headings; where it is written, for errors."""

    where: str
    record: Mapping[str, Any] | None


def split_names(source: str | Path) -> list[str]:
    """Return the splits that a folder or a dataset names by itself; a file names them in its records, if it does."""
    if isinstance(source, str) and is_table(source):
        return sorted({split for _, split, _ in read_rows(source)})
    file = Path(source)
    if file.is_dir():
        return sorted({path.stem for path in file.iterdir() if path.suffix in ENDINGS})
    found = {str(line.record["split"]) for line in _file(file) if line.record and line.record.get("split")}
    return sorted(found)


def read_lines(source: str | Path, splits: Sequence[str], known: Sequence[str] | None = None) -> dict[str, list[Line]]:
    """Return the lines of splits, of which `train|val` joins several; a file without splits is its only one.

    A folder has a file for each split, SPLIT.tsv, .csv, .jsonl or .json; only those asked for are read. In .tsv files
    a quotation mark is a character like any other, as GLUE's need it.
    Raises ValueError naming the splits there are for one that is not there.
    """
    known = split_names(source) if known is None else known
    if not known and len(splits) > 1:
        raise ValueError(
            f"{source} names no splits; expected {', '.join(map(repr, splits))}; add a split to each line, or give a "
            "folder with a file for each"
        )
    for part in (part for split in splits for part in split.split("|")):
        if known and part not in known:
            raise ValueError(f"{source} has no split {part!r}; it has: {', '.join(known)}.{nearest(part, known)}")
    if not known:
        return {splits[0]: list(_file(Path(source)))}
    lines = list(_by_split(source, {part for split in splits for part in split.split("|")}))
    return {split: [line for part, line in lines if part in split.split("|")] for split in splits}


def _by_split(source: str | Path, wanted: set[str]) -> Iterator[tuple[str, Line]]:
    if isinstance(source, str) and is_table(source):
        yield from ((split, Line(where, row)) for where, split, row in read_rows(source) if split in wanted)
    elif Path(source).is_dir():
        for split, file in _files(Path(source), wanted).items():
            yield from ((split, line) for line in _file(file))
    else:
        for line in _file(Path(source)):
            # a torn line belongs to no split that could be known; it is counted with each
            for split in wanted if line.record is None else {str(line.record.get("split") or "train")} & wanted:
                yield split, line


def _files(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Return the file of each split."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix not in ENDINGS or file.stem not in wanted:
            continue
        if file.stem in found:
            raise ValueError(
                f"{folder} has two files for the split {file.stem!r}: {found[file.stem].name} and {file.name}; "
                "expected one; move the other away"
            )
        found[file.stem] = file
    return found


def _file(file: Path) -> Iterator[Line]:
    if file.suffix == ".tsv" and file.is_file():
        yield from _tsv(file)
        return
    for where, record in read_records(file):
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected an object with a text, not {type(record).__name__}; mend it")
        yield Line(where, record)


def _tsv(file: Path) -> Iterator[Line]:
    """Read tab-separated lines as they are; not by csv, which would read quotation marks."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason}); expected UTF-8; save it as that") from None
    rows = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    headings = rows[0]
    first = 1
    if len(headings) == len(COLA) and headings[1] in ("0", "1"):
        headings, first = list(COLA), 0
    for number, cells in enumerate(rows[first:], first + 1):
        if cells != [""]:
            fits = len(cells) == len(headings)
            yield Line(f"{file.name} line {number}", dict(zip(headings, cells, strict=True)) if fits else None)
