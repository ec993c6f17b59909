"""How much memory this process may still take: what the machine has free, or what its container leaves of that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

# of a control group: limit, use, the part of the use that is given back when it is needed; version 2, version 1
UNIFIED = ("memory.max", "memory.current", "inactive_file")
LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: the least of the machine's and of its control groups'.

    root: where the file systems of the kernel are found; anywhere but on Linux there are none.
    """
    return min([int(psutil.virtual_memory().available), *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """Yield what is left of each limit of memory on this process' control groups and on those around them."""
    for base, path, names in _groups(root):
        group = base / path.lstrip("/")
        # a container often sees its own group as the root, under another name than the process has it by
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                lines = (folder / "memory.stat").read_text().splitlines()
            except OSError:
                continue  # the outermost group has no limit, and others may not be there for us
            inactive = next((line.split()[1] for line in lines if line.split()[0] == names[2]), 0)
            if limit != "max":
                yield max(0, int(limit) - int(used) + int(inactive))


def _groups(root: Path) -> Iterator[tuple[Path, str, tuple[str, str, str]]]:
    """Yield where groups that limit memory are mounted, the path of this process in them, and the names of files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield (mounted / "unified" if (mounted / "unified").is_dir() else mounted), path, UNIFIED
        elif "memory" in controllers.split(","):
            yield mounted / "memory", path, LEGACY
