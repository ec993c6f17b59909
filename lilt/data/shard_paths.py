"""Which tars `--data` names: one file, `shards/{00000..01234}.tar`, or a folder of tars."""

from __future__ import annotations

import json
import re
from pathlib import Path

PLAN = "shards.json"  # what `lilt shards` means to write into a folder
_REMOTE = re.compile(r"[a-z][a-z0-9+]+:")  # two letters at least: C: is a drive


def is_shards(data: str) -> bool:
    """Say whether `--data` names shards: a .tar, or a folder."""
    return data.endswith((".tar", ".tar.gz", ".tgz")) or Path(data).is_dir()


def shard_paths(data: str) -> list[Path]:
    """Return the tars that `--data` names, in order.

    Raises ValueError for a pattern that cannot be read, a file that is missing, and tars that are packed or elsewhere.
    """
    if _REMOTE.match(data):
        raise ValueError(
            f"{data} is not a local path; shards are read at random places, which a stream cannot do: copy them to "
            "this machine or mount them, and give their paths"
        )
    if Path(data).is_dir():
        return _folder(Path(data))
    if not data.endswith(".tar"):
        raise ValueError(f"{data} is compressed; expected plain .tar, which can be read at any place; unpack it first")
    files = [Path(name) for name in expand_braces(data)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} does not exist ({len(missing):,} of {len(files):,} shards do not); expected every file of "
            f"{data!r}; check --data"
        )
    if len(set(files)) < len(files):
        raise ValueError(f"{data!r} names a shard twice; expected each once, or its samples count double; mend --data")
    return files


def _folder(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.tar"))
    plan = folder / PLAN
    planned = json.loads(plan.read_text(encoding="utf-8"))["shards"] if plan.is_file() else max(1, len(files))
    if len(files) < planned:
        raise ValueError(
            f"the folder {folder} holds {len(files):,} .tar of {planned:,}; expected all of a set; finish packing "
            "them with lilt shards, or name those you want"
        )
    return files


def expand_braces(pattern: str) -> list[str]:
    """Return the names of `a{00..12}` and `a{x,y}`, the last braces running fastest.

    Raises ValueError for braces that do not close, are nested, or say nothing.
    """
    head, opened, rest = pattern.partition("{")
    inside, closed, tail = rest.partition("}")
    if "}" in head or bool(opened) != bool(closed) or "{" in inside:
        raise ValueError(f"cannot read the braces of {pattern!r}; expected {{00000..01234}} or {{a,b}}, side by side")
    if not opened:
        return [pattern]
    tails = expand_braces(tail)
    return [head + word + end for word in _words(inside, pattern) for end in tails]


def _words(inside: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None and "," in inside:
        return inside.split(",")
    if numbers is None or int(numbers[1]) > int(numbers[2]):
        raise ValueError(f"cannot read {{{inside}}} in {pattern!r}; expected {{00000..01234}}, counting up, or {{a,b}}")
    padded = any(len(n) > 1 and n.startswith("0") for n in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
