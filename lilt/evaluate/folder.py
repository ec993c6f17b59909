"""A run folder opened for evaluation."""

from __future__ import annotations

from pathlib import Path

import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from lilt import distributed
from lilt.dual import DualEncoder, load


def open_run(run: str) -> DualEncoder:
    """Load a checkpoint to where this process works; the processes of a launcher find one another."""
    # not an Accelerator: it would settle the precision of a training that follows in this process
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    distributed.use_all_cores()
    model = load(run)
    model.to(device)
    return model


def data_of(settings: Path, data: str | None, image_root: str | None) -> tuple[str | None, str | None]:
    """Return the data given and its image root, or those in the settings of a run, if it has any."""
    if data is not None or not settings.is_file():
        return data, image_root
    trained_with = yaml.safe_load(settings.read_text(encoding="utf-8"))
    return trained_with.get("val_data") or trained_with["data"], image_root or trained_with["image_root"]
