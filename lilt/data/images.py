"""Pictures from files, from bytes, or from rows of a Hugging Face dataset; what cannot be read says why."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps
from torch import Tensor

from lilt.data.hub import is_row, row_image
from lilt.data.transforms import Transform

Fault = tuple[str, str]  # what could not be read, and why
# Pillow promises no kind of error, and its plugins raise each of these at some damage; MemoryError is none of theirs
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, EOFError,
    RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


def image_file(source: str | Path | BinaryIO) -> str | Path | BinaryIO:
    """Return what holds the bytes of a picture: a file as it is, the picture of `hf:…#row` as a stream."""
    return row_image(source) if isinstance(source, str) and is_row(source) else source


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open, decode and turn upright as RGB."""
    with Image.open(image_file(source)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_image(
    source: str | BinaryIO, transform: Transform, name: str | None = None
) -> tuple[Tensor | None, Fault | None]:
    """Return the transformed image, or None and (name, reason) when it cannot be read; a path is its own name."""
    try:
        picture = open_image(source)
    except UNREADABLE as error:
        return None, (name or str(source), f"{type(error).__name__}: {error}")
    return transform(picture), None
