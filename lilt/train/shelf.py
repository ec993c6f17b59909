"""What a step in pieces keeps between its two passes: where it is, on the host, or on disk, as there is place."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lilt import distributed
from lilt.data.store import take_place
from lilt.memory import available

SPILL = ("auto", "off", "disk")
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of what is free when a step begins


class Shelf:
    """Keeps the tensors of one step after the other.

    how: auto keeps a tensor on its device while there is place, then on the host, then in files under folder; off
    leaves all where they are; disk puts all into files. dtype: as which it is kept, by default as it comes.
    Files are used again by each step, and go at the end of a `with`.
    """

    def __init__(self, folder: Path, how: str = "auto", dtype: torch.dtype | None = None):
        self.folder = folder / f"spill-{distributed.rank()}"
        self.how, self.dtype = how, dtype
        self.on_disk = 0  # bytes of this step
        self._files = 0
        self._written: set[Path] = set()
        self._told = False
        self._device = self._host = 0.0

    def clear(self) -> None:
        """Begin a step: nothing that was kept before is needed any more."""
        self._files = self.on_disk = 0
        self._host = HOST_SHARE * available() / distributed.local_world_size()
        self._device = 0.0
        if torch.cuda.is_available():
            idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own, and free for us
            self._device = DEVICE_SHARE * (torch.cuda.mem_get_info()[0] + idle)

    def put(self, tensor: Tensor, exact: bool = False) -> Tensor:
        """Return the same values, perhaps in another place, where they are until `clear`; exact: as they come."""
        kind = tensor.dtype if exact or self.dtype is None else self.dtype
        size = tensor.numel() * kind.itemsize
        if self.how == "off" or size == 0:
            return tensor.to(kind)
        if self.how == "auto":
            if tensor.device.type != "cpu" and size <= self._device:
                self._device -= size
                return tensor.to(kind)
            if size <= self._host:
                self._host -= size
                return tensor.to("cpu", kind)
        return self._write(tensor, size, kind)

    def _write(self, tensor: Tensor, size: int, kind: torch.dtype) -> Tensor:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self._files}.bin"
        self._files += 1
        self.on_disk += size
        try:
            take_place(file, size)
            kept = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=kind).view(tensor.shape)
        except (RuntimeError, OSError) as error:
            free = shutil.disk_usage(self.folder).free
            raise ValueError(
                f"a step keeps {self.on_disk / 2**30:.1f} GiB on disk in {self.folder}, where {free / 2**30:.1f} GiB "
                "are free; expected place for it; make room there, start with a lower --batch_size or an --output on "
                "another disk, or go on with --spill off where memory has place"
            ) from error
        self._written.add(file)
        return kept.copy_(tensor)

    def news(self) -> str | None:
        """Return a line when for the first time something is on disk."""
        if self._told or not self.on_disk:
            return None
        self._told = True
        return f"a step keeps {self.on_disk / 2**20:,.1f} MiB on disk, in {self.folder}"

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._written:
            file.unlink(missing_ok=True)
        if self._written:
            with suppress(OSError):  # somebody else has put something there
                self.folder.rmdir()
        self._written.clear()
