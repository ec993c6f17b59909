"""A manifest packed into WebDataset tars: whole shards only, the same bytes each time, stopped and gone on with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from lilt.data.images import UNREADABLE, Fault, image_file, open_image
from lilt.data.manifest import Sample
from lilt.data.shard_index import IMAGES, beside, index_of, keep, scan
from lilt.data.shard_paths import PLAN

BAD = "bad_images.jsonl"
_CHUNK = 32  # images in memory while packing


@dataclass(frozen=True)
class Packed:
    """What lies in a folder of shards."""

    folder: Path
    shards: int
    samples: int
    bad: list[Fault]
    num_bytes: int

    @property
    def pattern(self) -> str:
        """Return what `--data` takes."""
        last = self.shards - 1
        return str(self.folder / ("00000.tar" if last == 0 else f"{{00000..{last:05d}}}.tar"))

    def report(self) -> str:
        """Say what lies where, and how to train on it."""
        size = f"{self.num_bytes / 2**20:,.1f} MiB"
        lines = [
            f"{self.samples:,} samples in {self.shards:,} shards ({size}) are in {self.folder}. Train on them with:",
            f"  lilt train --data '{self.pattern}'",
        ]
        if self.bad:
            lines.append(f"{len(self.bad):,} images could not be read and were left out; see {self.folder / BAD}")
        return "\n".join(lines)


def pack(
    samples: Sequence[Sample],
    folder: Path,
    *,
    per_shard: int = 1000,
    image_px: int | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Packed:
    """Write samples into shards of per_shard with their indices; shards that are there already stay.

    Images are copied byte for byte, or with image_px made smaller, to that shorter side. A sample's key is its place
    among the samples. An image that cannot be read is left out and listed in bad_images.jsonl.
    Raises ValueError for a folder that holds something else.
    """
    for name, value in (("per_shard", per_shard), ("image_px", image_px)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}; expected more than 0; give a positive number, or leave it out")
    starts = range(0, len(samples), per_shard)
    _open_folder(folder, _plan(samples, len(starts), per_shard, image_px), overwrite)
    tars = _tars(folder, len(starts))
    for tar, start in zip(tars, starts, strict=True):
        rows = samples[start : start + per_shard]
        if tar.exists():
            advance(len(rows))
        else:
            _write_shard(tar, rows, start, image_px, advance)
    written, num_bytes = sum(len(index_of(tar)) for tar in tars), sum(tar.stat().st_size for tar in tars)
    return Packed(folder, len(tars), written, _bad(folder), num_bytes)


def _tars(folder: Path, shards: int) -> list[Path]:
    return [folder / f"{number:05d}.tar" for number in range(shards)]


def _plan(samples: Sequence[Sample], shards: int, per_shard: int, image_px: int | None) -> dict[str, object]:
    """Return what tells one packing from another."""
    content = hashlib.sha256()
    for sample in samples:
        content.update(json.dumps([str(sample.image), sample.captions]).encode())
    sizes = {"shards": shards, "per_shard": per_shard, "samples": len(samples), "image_px": image_px}
    return sizes | {"content": content.hexdigest()}


def _open_folder(folder: Path, plan: dict[str, object], overwrite: bool) -> None:
    file = folder / PLAN
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if there == plan and not overwrite:
        return
    old = sorted(folder.glob("*.tar"))
    if there is not None and not overwrite:
        raise ValueError(
            f"{folder} already holds {len(old):,} shards of other samples or settings; nothing was changed: give "
            "another --output, or replace them with --overwrite"
        )
    planned = _tars(folder, there["shards"] if there else 0)
    if others := [tar for tar in old if tar not in planned]:
        raise ValueError(
            f"{folder} holds {len(others):,} .tar that lilt shards has not written, such as {others[0].name}; expected "
            "none of others; nothing was changed: move them elsewhere, or give another --output"
        )
    for tar in old:
        beside(tar).unlink(missing_ok=True)
        tar.unlink()
    (folder / BAD).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{PLAN}.tmp")
    draft.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def _write_shard(
    tar: Path, samples: Sequence[Sample], first: int, image_px: int | None, advance: Callable[[int], None]
) -> None:
    """Write one shard beside its place, and put it there when it is whole."""
    draft = tar.with_name(f"{tar.name}.tmp")
    bad: list[Fault] = []
    try:
        with draft.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as members:
                for number, (sample, found) in enumerate(_contents(samples, image_px), first):
                    if isinstance(found, str):
                        bad.append((str(sample.image), found))
                    else:
                        _add(members, f"{number:09d}.{found[0]}", found[1])
                        captions = {"captions": list(sample.captions)}
                        _add(members, f"{number:09d}.json", json.dumps(captions, ensure_ascii=False).encode())
                    advance(1)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave an empty file under the final name
        keep(scan(draft), draft, beside(tar))
        if bad:
            with (tar.parent / BAD).open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"image": image, "reason": why}) + "\n" for image, why in bad)
        draft.replace(tar)
    finally:
        draft.unlink(missing_ok=True)


def _contents(samples: Sequence[Sample], image_px: int | None) -> Iterator[tuple[Sample, tuple[str, bytes] | str]]:
    """Yield each sample with ending and bytes of its image, or with why it cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside the interpreter's lock
        for at in range(0, len(samples), _CHUNK):
            chunk = samples[at : at + _CHUNK]
            yield from zip(chunk, pool.map(partial(_stored, image_px=image_px), chunk), strict=True)


def _stored(sample: Sample, image_px: int | None) -> tuple[str, bytes] | str:
    try:
        return stored_image(sample.image, image_px)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"


def stored_image(source: str | Path, image_px: int | None) -> tuple[str, bytes]:
    """Return ending and bytes of an image, smaller where its shorter side is over image_px; PNG stays PNG, the rest
    becomes JPEG."""
    file = image_file(source)
    content = Path(file).read_bytes() if isinstance(file, (str, Path)) else file.read()
    with Image.open(io.BytesIO(content)) as image:
        form, size = str(image.format).lower().replace("jpeg", "jpg"), image.size
    if image_px is None or min(size) <= image_px:
        return form if form in IMAGES else "jpg", content
    picture = open_image(io.BytesIO(content))
    share = image_px / min(size)
    smaller = picture.resize((round(picture.width * share), round(picture.height * share)), Image.Resampling.BICUBIC)
    made = io.BytesIO()
    if form == "png":
        smaller.save(made, "PNG")
    else:
        smaller.save(made, "JPEG", quality=95)
    return "png" if form == "png" else "jpg", made.getvalue()


def _add(members: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # without times and owners: the same samples are the same bytes
    info.size = len(content)
    members.addfile(info, io.BytesIO(content))


def _bad(folder: Path) -> list[Fault]:
    lines = (folder / BAD).read_text(encoding="utf-8").splitlines() if (folder / BAD).is_file() else []
    found = [json.loads(line) for line in lines]
    # a shard that was stopped at the very end has listed its images twice
    return list({record["image"]: (record["image"], record["reason"]) for record in found}.values())
