"""Hugging Face datasets as data: `hf:NAME_OR_FOLDER?image=…&captions=…&split=…&name=…`; the package is an extra.

The captions become samples like those of a manifest; a picture stays in the dataset and is called `hf:…#split/row`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from lilt.data.manifest import CAPTION_KEYS, IMAGE_KEYS, Sample, captions_of
from lilt.data.stamp import file_stamp
from lilt.registry import nearest

PREFIX = "hf:"
_OPTIONS = ("image", "captions", "split", "name")


@dataclass(frozen=True)
class _Table:
    """A dataset by split, its pictures as bytes, its columns and which are used; split is None where the table is one.

    captions is as the spec names it, None where it does not. stamps: what tells the rows of each split from those that
    had the same names before; None where nothing does.
    """

    splits: dict[str, Any]
    columns: list[str]
    image: str
    captions: str | None
    split: str | None
    stored: bool  # pictures are in the dataset; else the column names files
    stamps: dict[str, str | None]


def is_table(data: str) -> bool:
    """Say whether `--data` names a Hugging Face dataset."""
    return data.startswith(PREFIX)


def is_row(source: str) -> bool:
    """Say whether the name of a picture is one in a dataset."""
    return is_table(source) and "#" in source


def read_table(spec: str, image_root: str | Path | None = None) -> list[Sample]:
    """Return the samples of a dataset, in the order of its rows.

    ?image= and ?captions= name columns (default: the first with a usual name), ?split= a column that says the split
    of each row (default: the dataset's own splits), ?name= a configuration of the hub. Pictures that the dataset only
    names are relative to image_root. Raises ValueError for what cannot be used.
    """
    table = _open(spec)
    key = _column(spec, table.columns, table.captions, "captions", CAPTION_KEYS)
    samples = []
    for where, image, split, cells in read_columns(spec, [key], image_root):
        samples.append(Sample(image, tuple(captions_of(where, key, cells[key])), split))
    if not samples:
        raise ValueError(f"{spec} has no rows; expected one image a row; give a dataset with samples")
    return samples


def table_columns(spec: str) -> list[str]:
    """Return the names of the columns of a dataset with pictures."""
    return _open(spec).columns


def read_columns(
    spec: str, columns: Sequence[str], image_root: str | Path | None = None
) -> Iterator[tuple[str, Path | str, str, dict[str, Any]]]:
    """Yield (place, picture, split, cells of columns) of each row; options as in `read_table`."""
    table = _open(spec)
    wanted = [*columns, *(c for c in (table.split, None if table.stored else table.image) if c is not None)]
    for part, rows in table.splits.items():
        for number, row in enumerate(_rows(rows.select_columns(list(dict.fromkeys(wanted))))):
            split = str(row[table.split]) if table.split is not None else part
            image = f"{spec}#{part}/{number}" if table.stored else Path(image_root or ".") / str(row[table.image])
            yield f"{spec} split {part} row {number}", image, split, {column: row[column] for column in columns}


def read_rows(spec: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (place, split, row) of a dataset that need not have pictures; those that it has are left out."""
    name, options = _parts(spec)
    splits = _load(spec, name, options.get("name"))
    import datasets

    for part, rows in splits.items():
        kept = [c for c, feature in rows.features.items() if not isinstance(feature, datasets.Image)]
        split = _column(spec, kept, options["split"], "split", ()) if "split" in options else None
        for number, row in enumerate(_rows(rows.select_columns(kept))):
            yield f"{spec} split {part} row {number}", part if split is None else str(row[split]), row


def row_image(source: str) -> BinaryIO | str:
    """Return the picture `hf:…#split/row` as a stream, or the file where the dataset has put it."""
    spec, part, row = _place(source)
    table = _open(spec)
    found = table.splits[part][row][table.image]
    content = found["bytes"] if isinstance(found, dict) else found
    if content is not None:
        return BytesIO(content)
    if found is None or found["path"] is None:
        raise ValueError("the row has no picture")
    return str(found["path"])


def row_stamp(source: str) -> str | None:
    """Return what tells the picture `hf:…#split/row` from one that had that name before; None where nothing does."""
    spec, part, row = _place(source)
    stamp = _open(spec).stamps[part]
    file = _outside(spec, part).get(row)
    return stamp if stamp is None or file is None else f"{stamp} {file_stamp(file)}"


def _place(source: str) -> tuple[str, str, int]:
    spec, _, place = source.rpartition("#")
    part, _, row = place.rpartition("/")
    return spec, part, int(row)


@lru_cache(maxsize=8)
def _outside(spec: str, part: str) -> dict[int, str]:
    """Return the files of those rows whose pictures do not lie in the dataset; no picture is read."""
    table = _open(spec)
    found: dict[int, str] = {}
    start = 0
    for batch in table.splits[part].select_columns([table.image]).with_format("arrow").iter(batch_size=1000):
        for cells in batch.column(0).chunks:
            if hasattr(cells, "field"):  # else they are bytes and nothing else
                empty, paths = cells.field("bytes").is_null().to_pylist(), cells.field("path").to_pylist()
                found |= {start + i: path for i, path in enumerate(paths) if empty[i] and path is not None}
            start += len(cells)
    return found


def _rows(rows: Any) -> Iterable[dict[str, Any]]:
    for batch in rows.iter(batch_size=1000):
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))


@lru_cache(maxsize=8)  # a data worker asks for every picture
def _open(spec: str) -> _Table:
    name, options = _parts(spec)
    splits = _load(spec, name, options.get("name"))
    columns = list(next(iter(splits.values())).features)
    image = _column(spec, columns, options.get("image"), "image", IMAGE_KEYS)
    split = _column(spec, columns, options["split"], "split", ()) if "split" in options else None
    import datasets

    stored = True
    stamps = {part: _stamp(rows) for part, rows in splits.items()}
    for part, rows in splits.items():
        feature = rows.features[image]
        if isinstance(feature, datasets.Image):
            # lilt opens pictures itself: upright, as RGB, and a broken one is a fault and no end
            splits[part] = rows.cast_column(image, datasets.Image(decode=False))
        elif getattr(feature, "dtype", None) in ("string", "large_string"):
            stored = False
        elif getattr(feature, "dtype", None) not in ("binary", "large_binary"):
            raise ValueError(
                f"{spec}: column {image!r} holds {feature}; expected pictures, bytes or paths; name another: ?image="
            )
    return _Table(splits, columns, image, options.get("captions"), split, stored, stamps)


def _stamp(rows: Any) -> str | None:
    """Return what a split is told by: the files it is mapped from, or where there are none what datasets says."""
    files = [file_stamp(file["filename"]) for file in rows.cache_files]
    if files:
        return hashlib.sha256("\n".join(files).encode()).hexdigest()
    said = getattr(rows, "_fingerprint", None)  # a hash of what is in it, or of how it was made
    return None if said is None else str(said)


def _parts(spec: str) -> tuple[str, dict[str, str]]:
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _OPTIONS:
            raise ValueError(f"{spec} has no option {key!r}; it takes: {', '.join(_OPTIONS)}.{nearest(key, _OPTIONS)}")
    return name, options


def _load(spec: str, name: str, config: str | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{spec} needs the package datasets, which is not installed; expected it beside lilt; run: pip install "
            "'lilt[datasets]'"
        ) from None
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"datasets could not load {name!r}: {error}; expected a folder of save_to_disk, a folder of files, or the "
            "name of a dataset on the hub; check --data"
        ) from error
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    return dict(found)


def _column(spec: str, columns: list[str], given: str | None, kind: str, usual: tuple[str, ...]) -> str:
    found = next((key for key in ([given] if given is not None else usual) if key in columns), None)
    if found is None:
        wanted = f"no column {given!r}" if given is not None else f"no {kind} column"
        raise ValueError(
            f"{spec} has {wanted}; it has: {', '.join(columns)}.{nearest(given or kind, columns)} Name it with ?{kind}="
        )
    return found
