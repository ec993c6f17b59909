"""The run folder: found, refused, opened; a run's settings beside what it wrote."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lilt import checkpoint, distributed
from lilt.config import TrainConfig
from lilt.dual import load
from lilt.train.log import BAD_IMAGES, METRICS
from lilt.train.state import STATE

CONFIG = "config.yaml"
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
)


def new_folder(config: TrainConfig) -> str:
    """Return a folder of runs/ that is not there yet, named after the policy."""
    if config.resume:
        raise ValueError("--resume needs to know which run; name its folder with --output, or use its config.yaml")
    vision, text = config.vision_policy or config.policy, config.text_policy or config.policy
    words = re.sub(r"[^a-z0-9]+", "_", vision if vision == text else f"{vision}-{text}")[:80].strip("_")
    names = [f"runs/{words}", *(f"runs/{words}-{n}" for n in range(2, 10_000))]
    free = next(name for name in names if not Path(name).exists())
    return str(distributed.gather_objects(free)[0])


def check_folder(config: TrainConfig, folder: Path) -> None:
    """Raise before anything is built when the folder holds another run, or none where one should go on."""
    if config.resume:
        _same_settings(config, folder)
    elif checkpoint.holds_run(folder) and not config.overwrite:
        raise ValueError(
            f"{folder} already holds a run; nothing was changed: go on with --resume, replace it with --overwrite, or "
            "give another --output"
        )
    distributed.barrier()  # no rank may look after another has begun to write


def open_folder(config: TrainConfig, folder: Path) -> None:
    """Make the run folder, emptied of an old run where that was asked for."""
    if config.resume or not distributed.is_main():
        return
    old = (checkpoint.ADAPTER, checkpoint.CONTRACT, checkpoint.CARD, METRICS, BAD_IMAGES, CONFIG, "report.html")
    for name in old:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / STATE, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"resume": False, "overwrite": False}
    (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


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
    then = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, now in asdict(config).items():
        if name not in _FREE and then.get(name) != now:
            raise ValueError(
                f"the run in {folder} was started with {name}={then.get(name)}, not {now}; go on with its own "
                f"settings: --config {file} --resume"
            )
