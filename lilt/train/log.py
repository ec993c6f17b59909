"""What a run writes while it goes: metrics.jsonl, the list of bad images, and a live line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lilt import distributed

METRICS, BAD_IMAGES = "metrics.jsonl", "bad_images.jsonl"


class RunLog:
    """Appends to the run folder and shows progress; on all ranks but the main one it does nothing."""

    def __init__(self, folder: Path, console: Console):
        self.folder = folder
        self.main = distributed.is_main()
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.main,
        )
        # a run that goes on knows what it has already listed
        self.bad = {record["image"] for record in _read_lines(folder / BAD_IMAGES)}

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def bar(self, name: str, total: int, done: int = 0) -> TaskID:
        """Start a bar."""
        return self.progress.add_task(name, total=total, completed=done, state="")

    def move(self, bar: TaskID, done: int, state: str = "") -> None:
        """Move a bar to a place; state is shown behind it."""
        self.progress.update(bar, completed=done, state=state)

    def close(self, bar: TaskID) -> None:
        """Take a bar away."""
        self.progress.remove_task(bar)

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        if self.main:
            self.progress.console.print(text)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.main:
            append(self.folder / METRICS, [record])

    def rewind(self, step: int) -> None:
        """Forget the lines of steps that a killed run made after its last state; they will be made again."""
        if self.main and (file := self.folder / METRICS).is_file():
            fresh = file.with_name(f"{METRICS}.tmp")
            fresh.unlink(missing_ok=True)
            append(fresh, [record for record in read_metrics(self.folder) if record["step"] <= step])
            fresh.replace(file)

    def faults(self, faults: Iterable[tuple[str, str]]) -> int:
        """List images that could not be read, each once; return how many there are by now."""
        fresh = {path: reason for path, reason in faults if path not in self.bad}
        self.bad |= fresh.keys()
        if self.main and fresh:
            append(self.folder / BAD_IMAGES, [{"image": p, "reason": r} for p, r in fresh.items()])
        return len(self.bad)


def append(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines."""
    with file.open("a", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl back; a last line cut off by a crash is left out."""
    return _read_lines(folder / METRICS)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def peak_memory() -> int:
    """Return the largest memory this process has held, in bytes: the accelerator's where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
