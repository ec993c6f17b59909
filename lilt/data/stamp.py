"""What tells a file from one that lay there before it, without reading it."""

from __future__ import annotations

from pathlib import Path


def file_stamp(path: str) -> str:
    """Return path, size and time of change; a file that is not there has its path alone."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # ValueError: no path that a file could have
        return path
    return f"{path} {found.st_size} {found.st_mtime_ns}"
