"""Rows that were computed once: what a frozen network says of each image or caption, in memory or on disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARED = Path("/dev/shm")  # where Linux keeps what processes share; a container's is often 64 MiB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Store:
    """Items of rows, and which of them are known.

    Item i has lengths[i] rows of `shape`, or is one of `shape` where lengths is None. On disk the files are memory
    mapped and may be shared by the processes of one machine. An item counts as known once its values are written, so
    that a killed run leaves none half. It pickles as its path; in memory, as shared memory if data workers read it.
    """

    def __init__(
        self,
        folder: Path | None,
        count: int,
        shape: Sequence[int],
        dtype: str = "fp32",
        lengths: Tensor | None = None,
        gives: torch.dtype = torch.float32,
        shared: bool = True,
    ):
        """folder: where the files are or will be; None keeps the rows in memory. gives: the type they are read as.

        shared: rows in memory are read by other processes too.
        """
        self.shared = shared
        self.folder, self.count, self.shape, self.dtype, self.gives = folder, count, tuple(shape), DTYPES[dtype], gives
        self.offsets = None if lengths is None else torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        self._open()

    @staticmethod
    def size(count: int, shape: Sequence[int], dtype: str, lengths: Tensor | None = None) -> int:
        """Return the bytes that a store of such items takes."""
        rows = count if lengths is None else int(lengths.sum())
        return rows * math.prod(shape) * DTYPES[dtype].itemsize

    def _open(self) -> None:
        rows = self.count if self.offsets is None else int(self.offsets[-1])
        values = rows * math.prod(self.shape)
        if self.folder is None:
            flat, self.known = torch.zeros(values, dtype=self.dtype), torch.zeros(self.count, dtype=torch.bool)
            if self.shared:
                _share(flat)
                _share(self.known)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            # a new file grows to its size here, and fresh bytes are zero: nothing is known
            flat = _mapped(self.folder / "rows.bin", values, self.dtype)
            self.known = _mapped(self.folder / "known.bin", self.count, torch.bool)
        self.rows = flat.view(-1, *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.folder is not None:
            del state["rows"], state["known"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.folder is not None:
            self._open()

    def missing(self) -> Tensor:
        """Return the items that are not known."""
        return (~self.known).nonzero().flatten()

    def put(self, items: Tensor, rows: Tensor) -> None:
        """Write rows (B, *shape), or (B, L, *shape) of which each item has the first ones, under their items (B,)."""
        rows = rows.detach().to("cpu", self.dtype)
        if self.offsets is None:
            self.rows[items] = rows
        else:
            for item, padded in zip(items.tolist(), rows, strict=True):
                start, stop = self.offsets[item : item + 2].tolist()
                self.rows[start:stop] = padded[: stop - start]
        self.known[items] = True

    def good(self, items: Tensor) -> Tensor:
        """Say which items (B,) are known."""
        return self.known[items]

    def get(self, items: Tensor) -> Tensor:
        """Read rows (B, *shape), or (B, L, *shape) with zeros behind the shorter ones and for unknown items."""
        if self.offsets is None:
            rows = self.rows[items]
        else:
            spans = [self.offsets[item : item + 2].tolist() for item in items.tolist()]
            parts = [self.rows[start:stop] for start, stop in spans]
            rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        good = self.good(items)
        if not bool(good.all()):
            rows = torch.where(good.view(-1, *[1] * (rows.ndim - 1)), rows, 0)
        return rows.to(self.gives)


def shared_free() -> int | None:
    """Return the bytes that are free in shared memory; None where it has no place of its own."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def _share(values: Tensor) -> None:
    try:
        values.share_memory_()
    except RuntimeError as error:
        free = shared_free()
        there = "" if free is None else f", and {free / 2**30:.2f} GiB are free in {SHARED}"
        raise ValueError(
            f"rows kept for data workers need {values.nbytes / 2**30:.2f} GiB of shared memory{there} ({error}); "
            "expected place for them; start the container with a larger --shm-size, or use --reuse disk or off, or "
            "--workers 0, which shares nothing"
        ) from error


def _mapped(file: Path, count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    try:
        take_place(file, size)
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        raise ValueError(
            f"{file} needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there ({error.strerror}); "
            "expected place for it; make room, set XDG_CACHE_HOME to another disk, or use reuse=off"
        ) from error
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype)


def take_place(file: Path, size: int) -> None:
    """Make a file at least so many bytes long, on disk and not only in name. Raises OSError where they are not there.

    A mapped file whose bytes are not there ends the process when they are written, without a word.
    """
    with file.open("ab") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
