"""Pictures from files, from bytes, or from rows of a Hugging Face dataset; what cannot be read says why."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image
from torch import Tensor

from lilt.data.hub import is_row, row_image
from lilt.data.transforms import Transform

Fault = tuple[str, str]  # what could not be read, and why
# Pillow promises no kind of error, and its plugins raise each of these at some damage; MemoryError is none of theirs
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, EOFError,
    RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
# by EXIF's orientation; 1 is upright
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def image_file(source: str | Path | BinaryIO) -> str | Path | BinaryIO:
    """Return what holds the bytes of a picture: a file as it is, the picture of `hf:…#row` as a stream."""
    return row_image(source) if isinstance(source, str) and is_row(source) else source


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open, decode and turn upright as RGB."""
    with Image.open(image_file(source)) as image:
        picture = image.convert("RGB")
        turn = _turn(image)
    return picture if turn is None else picture.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns a decoded picture upright; nothing where EXIF does not say it, or cannot be read.

    ImageOps.exif_transpose writes all of EXIF anew, and one wrong byte of it would cost the picture.
    """
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNREADABLE:
        return None


def read_image(
    source: str | BinaryIO, transform: Transform, name: str | None = None
) -> tuple[Tensor | None, Fault | None]:
    """Return the transformed image, or None and (name, reason) when it cannot be read; a path is its own name."""
    try:
        picture = open_image(source)
    except UNREADABLE as error:
        return None, (name or str(source), f"{type(error).__name__}: {error}")
    return transform(picture), None
