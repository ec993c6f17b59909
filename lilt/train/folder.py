"""The run folder: found, refused, opened; a run's settings beside what it wrote."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lilt import checkpoint, distributed
from lilt.config import TrainConfig
from lilt.dual import load
from lilt.train.log import BAD_IMAGES, METRICS
from lilt.train.state import STATE

CONFIG = "config.yaml"
Mark = tuple[int, int, int] | None  # what tells one config.yaml from a later one; None: there was none
T = TypeVar("T")
# what may differ between a run and its continuation without changing a single number
_FREE = (
    "resume",
    "overwrite",
    "output",
    "workers",
    "checkpointing",
    "log_every",
    "max_bad_share",
    "max_bad_steps",
    "keep_states",
    "price",
    "image_root",
    "spill",
)


def new_folder(config: TrainConfig) -> str:
    """Make a folder of runs/ that was not there yet, named after the policy; return its name."""
    if config.resume:
        raise ValueError("--resume needs to know which run; name its folder with --output, or use its config.yaml")
    words = re.sub(r"[^a-z0-9]+", "_", config.policy_name)[:80].strip("_")
    return _by_main_rank(partial(_claim, f"runs/{words}"))


def _claim(first: str) -> str:
    for name in (first, *(f"{first}-{n}" for n in range(2, 10_000))):
        # made at once: it is minutes until something is written, and another run may look for a name meanwhile
        with suppress(FileExistsError):
            Path(name).mkdir(parents=True)
            return name
    raise ValueError(f"{first} and 9,998 folders like it are taken; expected a free name; give one with --output")


@contextmanager
def given_back(folder: Path, ours: bool) -> Iterator[None]:
    """Take away the empty folder that `new_folder` has made (ours) when the run ends before it wrote anything."""
    try:
        yield
    except BaseException:
        if ours and distributed.is_main():
            with suppress(OSError):  # not empty: somebody has put something there
                folder.rmdir()
        raise


def check_folder(config: TrainConfig, folder: Path) -> Mark:
    """Raise before anything is built when the folder holds another run, or none where one should go on.

    Returns what `open_folder` knows by that no other run has taken the folder meanwhile.
    """
    mark = _mark(folder)
    if config.resume:
        _same_settings(config, folder)
    elif checkpoint.holds_run(folder) and not config.overwrite:
        raise ValueError(
            f"{folder} already holds a run; nothing was changed: go on with --resume, replace it with --overwrite, or "
            "give another --output"
        )
    distributed.barrier()  # no rank may look after another has begun to write
    return mark


def open_folder(config: TrainConfig, folder: Path, mark: Mark) -> None:
    """Make the run folder, emptied of an old run where that was asked for; mark: what `check_folder` returned.

    No rank goes on before that is done: it would read what is about to be removed.
    Raises ValueError on all ranks when another run has taken the folder meanwhile.
    """
    _by_main_rank(partial(_open, config, folder, mark))


def _open(config: TrainConfig, folder: Path, mark: Mark) -> None:
    taken = ValueError(
        f"{folder} was taken by another run while this one was being built; expected a folder of its own; nothing was "
        "changed: start again with another --output"
    )
    if not config.resume:
        if _mark(folder) != mark or (checkpoint.holds_run(folder) and not config.overwrite):
            raise taken
        old = (checkpoint.ADAPTER, checkpoint.CONTRACT, checkpoint.CARD, METRICS, BAD_IMAGES, "report.html")
        for name in (*old, *([CONFIG] if mark else [])):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / STATE, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        settings = asdict(config) | {"resume": False, "overwrite": False}
        try:
            with (folder / CONFIG).open("x", encoding="utf-8") as stream:  # of two runs, one makes the file
                stream.write(yaml.safe_dump(settings, sort_keys=False))
        except FileExistsError:
            raise taken from None
    for spilled in folder.glob("spill-*"):  # of a run that was killed
        if spilled.is_dir() and all(f.is_file() and re.fullmatch(r"\d+\.bin", f.name) for f in spilled.iterdir()):
            shutil.rmtree(spilled, ignore_errors=True)


def _mark(folder: Path) -> Mark:
    try:
        found = (folder / CONFIG).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _by_main_rank(work: Callable[[], T]) -> T:
    """Let the main rank do something while the others wait: all return what it returned, or raise what it raised."""
    done: tuple[T | None, Exception | None] = None, None
    if distributed.rank() == 0:
        try:
            done = work(), None
        except (OSError, ValueError) as error:
            done = None, error
    result, failed = distributed.gather_objects(done)[0]
    if failed is not None:
        raise failed
    return result  # type: ignore[no-any-return]


def merge_folder(run: str, scale: float, output: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write a run between the base towers (scale 0) and the tuned ones (1) as a folder of its own; say what was done.

    Its metrics name the run and the scale; those of the run were measured at scale 1 and are left out.
    """
    source = Path(run)
    folder = Path(output or f"{source if source.name else source.absolute()}-scale{scale:g}")
    if any((folder / name).exists() for name in (STATE, METRICS)):
        raise ValueError(
            f"{folder} holds a training run, which merge never replaces; nothing was written: give another --output"
        )
    if checkpoint.holds_run(folder) and not overwrite:
        raise ValueError(
            f"{folder} already holds a checkpoint; nothing was written: pass --overwrite or another --output"
        )
    done = {"run": run, "scale": scale, "output": str(folder)}
    load(run).interpolate(scale).save(folder, {"merge/from": run, "merge/scale": scale}, overwrite=overwrite)
    # evaluate reads from it which data the run was trained on
    (folder / CONFIG).unlink(missing_ok=True)
    if (source / CONFIG).is_file():
        shutil.copyfile(source / CONFIG, folder / CONFIG)
    return done


def _same_settings(config: TrainConfig, folder: Path) -> None:
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no run to resume; expected {file}; start it without --resume")
    # a setting that is younger than the run had its default
    then = {f.name: f.default for f in fields(config)} | yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, now in asdict(config).items():
        if name == "micro_batch" and now and now < (then[name] or now + 1):
            continue  # what a step that runs out of memory does by itself
        if name not in _FREE and then[name] != now:
            raise ValueError(
                f"the run in {folder} was started with {name}={then[name]}, not {now}; go on with its own "
                f"settings: --config {file} --resume"
            )
