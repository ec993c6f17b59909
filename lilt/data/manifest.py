"""Manifests: which image has which captions in which split."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lilt.registry import nearest

IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path")
CAPTION_KEYS = ("captions", "caption", "title", "text", "sentences")


@dataclass(frozen=True)
class Sample:
    """One image, a file or `hf:…#row`, and its captions."""

    image: Path | str
    captions: tuple[str, ...]
    split: str


def read_manifest(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """Read JSON Lines, CSV, TSV, Karpathy JSON or LilT JSON; lines of one image and split are joined.

    Images are relative to image_root, by default the manifest's folder; they are not opened here.
    Raises ValueError naming file and line for what cannot be used.
    """
    file = Path(path)
    root = Path(image_root) if image_root is not None else file.parent
    joined: dict[tuple[str, str], list[str]] = {}
    for where, record in read_records(file):
        image, captions, split = _fields(where, record)
        joined.setdefault((image, split), []).extend(captions)
    if not joined:
        raise ValueError(f"manifest {file} is empty; expected one image a line; give a file with samples")
    return [Sample(root / image, tuple(captions), split) for (image, split), captions in joined.items()]


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Return the records of a manifest as they are written, each with its place for errors."""
    if not file.is_file():
        raise ValueError(
            f"manifest {str(file)!r} does not exist; expected a .jsonl, .csv, .tsv or .json file; check --data"
        )
    readers = {".jsonl": _json_lines, ".csv": _table, ".tsv": _table, ".json": _json}
    if file.suffix not in readers:
        raise ValueError(
            f"manifest {file}: unknown ending {file.suffix!r}; expected {', '.join(readers)}; rename or convert"
        )
    return readers[file.suffix](file)


def select(samples: list[Sample], split: str, source: str = "manifest") -> list[Sample]:
    """Return the samples of a split; `train|restval` joins several."""
    known = sorted({s.split for s in samples})
    wanted = split.split("|")
    for name in wanted:
        if name not in known:
            raise ValueError(f"{source} has no split {name!r}; it has: {', '.join(known)}.{nearest(name, known)}")
    return [s for s in samples if s.split in wanted]


def _text(file: Path) -> str:
    """Read a file as UTF-8, with or without the byte order mark of spreadsheets."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file.name} line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from None


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    # not splitlines: a caption may hold a bare U+2028
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); expected one object a line; mend the line") from None
        yield where, record


def _table(file: Path) -> Iterator[tuple[str, Any]]:
    lines = io.StringIO(_text(file), newline="")
    reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        for record in reader:
            where = f"{file.name} line {reader.line_num}"
            if None in record:  # an unquoted comma would cut the caption short
                headings, surplus = len(record) - 1, len(record[None])
                raise ValueError(
                    f"{where}: {headings + surplus} cells under {headings} headings; expected one each; put quotes "
                    "around a text with a separator in it"
                )
            yield where, record
    except csv.Error as error:
        raise ValueError(
            f"{file.name} line {reader.reader.line_num}: {error}; expected a plain table; mend the line"
        ) from None


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file.name} line {error.lineno}: not JSON ({error.msg}); mend the file") from None
    # Karpathy: {"images": [{filepath, filename, sentences: [{raw}], split}]}; LilT: [{image, caption, …}]
    records = content.get("images") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(
            f"{file.name}: expected a list of samples, or an object with a list 'images'; convert the file"
        )
    for number, record in enumerate(records, 1):
        if isinstance(record, dict) and "filename" in record and "filepath" in record:
            record = {**record, "image": str(PurePosixPath(record["filepath"], record["filename"]))}
        yield f"{file.name} entry {number}", record


def _fields(where: str, record: Any) -> tuple[str, list[str], str]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image and captions, not {type(record).__name__}; mend it")
    image = next((record[k] for k in IMAGE_KEYS if isinstance(record.get(k), str) and record[k]), None)
    if image is None:
        raise ValueError(
            f"{where}: no image; expected a path under {', '.join(IMAGE_KEYS)}; add one or remove the line"
        )
    key = next((k for k in CAPTION_KEYS if k in record), None)
    if key is None:
        raise ValueError(f'{where}: no captions; expected a list under "captions"; add one or remove the line')
    return image, captions_of(where, key, record[key]), str(record.get("split") or "train")


def captions_of(where: str, key: str, given: Any) -> list[str]:
    """Return the captions under a key: a text, a list of texts, or a list of {raw: text}."""
    captions = [given] if isinstance(given, str) else given
    if isinstance(captions, list):
        captions = [c.get("raw") if isinstance(c, dict) else c for c in captions]
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f'{where}: "{key}" must be a text or a list of texts; mend the line')
    if not captions or not all(c.strip() for c in captions):
        raise ValueError(f'{where}: "{key}" is empty; give at least one caption or remove the line')
    return captions
