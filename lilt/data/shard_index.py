"""Where each sample of a tar lies: found once, kept beside it or in the cache folder, never trusted unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilt.data.manifest import CAPTION_KEYS, captions_of
from lilt.demo.generate import cache_folder

VERSION = "1"  # to be raised when the same tar gives another index
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "json")
_TENSORS = ("image", "text", "json", "count", "names")
_EDGE = 65_536  # bytes at either end of a tar that tell it from another of its size


@dataclass(frozen=True)
class ShardIndex:
    """The N samples of a tar: first byte and length of image and captions (N, 2), length 0 where missing.

    json (N,) says how the captions are written, count (N,) how many there are (0: none that can be used), names
    (bytes,) holds the keys, torn why the tar could not be read to its end, or nothing.
    """

    image: Tensor
    text: Tensor
    json: Tensor
    count: Tensor
    names: Tensor
    torn: str = ""

    def __len__(self) -> int:
        return len(self.image)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        return bytes(self.names.tolist()).split(b"\0")[row].decode(errors="replace")


def index_of(tar: Path) -> ShardIndex:
    """Return the index of a tar: a kept one that still fits, or one made now and kept in the cache folder."""
    mark = _mark(tar)
    name = hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:32]
    cached = cache_folder() / "shards" / f"{name}.index"
    for file in (beside(tar), cached):
        found = _load(file, mark)
        if found is not None:
            return found
    index = scan(tar)
    keep(index, tar, cached)
    return index


def beside(tar: Path) -> Path:
    """Return the file beside a tar that may hold its index."""
    return tar.with_name(f"{tar.name}.index")


def scan(tar: Path) -> ShardIndex:
    """Read a tar's headers and captions; a torn tar gives the samples before the tear.

    A sample is what stands together under one key, the name up to the first dot after the last slash: an image and its
    captions, in .txt (one) or else in .json (under a usual key, or a list).
    """
    rows: list[dict[str, tuple[int, int]]] = []
    keys: list[str] = []
    members = _Members(tar)
    for key, ending, place in members:
        if not keys or key != keys[-1] or ending in rows[-1]:
            keys.append(key)
            rows.append({})
        rows[-1][ending] = place
    image = [next((row[e] for e in IMAGES if e in row), (0, 0)) for row in rows]
    text = [next((row[e] for e in TEXTS if e in row), (0, 0)) for row in rows]
    is_json = ["txt" not in row for row in rows]
    with tar.open("rb") as stream:
        count = [_count(stream, place, kind) for place, kind in zip(text, is_json, strict=True)]
    return ShardIndex(
        torch.tensor(image, dtype=torch.long).reshape(-1, 2),
        torch.tensor(text, dtype=torch.long).reshape(-1, 2),
        torch.tensor(is_json, dtype=torch.bool),
        torch.tensor(count, dtype=torch.long),
        torch.frombuffer(bytearray("\0".join(keys).encode(errors="replace") or b"\0"), dtype=torch.uint8),
        members.torn,
    )


class _Members:
    """Yields key, ending and place of the images and captions of a tar, as far as it can be read; then says why no
    further."""

    def __init__(self, tar: Path):
        self.tar, self.torn = tar, ""

    def __iter__(self) -> Iterator[tuple[str, str, tuple[int, int]]]:
        try:
            with self.tar.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as members:
                for member in members:
                    members.members = []  # type: ignore[attr-defined]  # the library would keep them all
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if stem and ending.lower() in IMAGES + TEXTS and member.isreg() and not member.issparse():
                        yield folder + slash + stem, ending.lower(), (member.offset_data, member.size)
                # the library takes a broken header for the end, which in a whole tar is a block of zeros
                if read_at(stream, members.offset, 512) != bytes(512):
                    self.torn = "it ends without an end mark"
        except tarfile.TarError as error:
            self.torn = str(error)


def read_at(stream: BinaryIO, first: int, length: int) -> bytes:
    """Read so many bytes from a place; fewer where the file ends."""
    stream.seek(first)
    return stream.read(length)


def read_member(stream: BinaryIO, place: Iterable[int], what: str) -> bytes:
    """Read a member of a tar. Raises ValueError where it is missing or cut off."""
    first, length = place
    if length == 0:
        raise ValueError(f"no {what}")
    content = read_at(stream, first, length)
    if len(content) < length:
        raise ValueError(f"the tar ends within its {what}")
    return content


def read_captions(stream: BinaryIO, place: Iterable[int], is_json: bool) -> list[str]:
    """Read the captions of a sample from its .txt or .json. Raises ValueError where there are none."""
    text = read_member(stream, place, "captions").decode("utf-8-sig")
    if not is_json:
        return captions_of("its .txt", "caption", text.strip())
    found = json.loads(text)
    if not isinstance(found, dict):
        return captions_of("its .json", "captions", found)
    key = next((k for k in CAPTION_KEYS if k in found), None)
    if key is None:
        raise ValueError(f"no captions in its .json; expected them under {', '.join(CAPTION_KEYS)}")
    return captions_of("its .json", key, found[key])


def _count(stream: BinaryIO, place: Iterable[int], is_json: bool) -> int:
    try:
        return len(read_captions(stream, place, is_json))
    except ValueError:
        return 0  # why is said when the sample is drawn


def _mark(tar: Path) -> str:
    """Return what a tar is known by: its size and its edges, for a copy has other times."""
    size = tar.stat().st_size
    with tar.open("rb") as stream:
        edges = read_at(stream, 0, _EDGE) + read_at(stream, max(0, size - _EDGE), _EDGE)
    return f"{VERSION} {size} {hashlib.sha256(edges).hexdigest()}"


def keep(index: ShardIndex, tar: Path, file: Path) -> None:
    """Write the index of a tar, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    os.close(handle)
    tensors = {name: getattr(index, name) for name in _TENSORS}
    try:
        save_file(tensors, draft, metadata={"about": json.dumps([_mark(tar), index.torn])})
        Path(draft).chmod(0o644)  # mkstemp makes a file that only its owner may read
        Path(draft).replace(file)
    finally:
        Path(draft).unlink(missing_ok=True)


def _load(file: Path, mark: str) -> ShardIndex | None:
    """Return a kept index, or None where there is none or it is of another tar."""
    try:
        with safe_open(file, "pt") as found:  # type: ignore[no-untyped-call]
            # one entry: of several the library would write the order anew each time
            kept, torn = json.loads((found.metadata() or {}).get("about", "[null, null]"))
            if kept != mark:
                return None
            return ShardIndex(**{name: found.get_tensor(name) for name in _TENSORS}, torn=torn)
    except (OSError, SafetensorError):
        return None
