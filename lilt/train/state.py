"""The resume state: everything that makes the next step the one it would have been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lilt import distributed
from lilt.checkpoint import load_trained
from lilt.model import TwoTower

STATE = "state"
_TRAINED = "trained.safetensors"


def keep_frozen_weights_out(accelerator: Accelerator, core: TwoTower) -> None:
    """Hook into the accelerator's saving: only trained tensors are written, and only they are read."""

    def save(models: list[Any], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in core.trained().items()}
            save_file(tensors, Path(folder) / _TRAINED)

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        load_trained(core, load_file(Path(folder) / _TRAINED), folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write the state beside the old one and exchange them; a crash leaves one of the two whole."""
    fresh, old, target = folder / f"{STATE}.tmp", folder / f"{STATE}.old", folder / STATE
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    distributed.barrier()
    accelerator.save_state(str(fresh), safe_serialization=True)
    distributed.barrier()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def find_state(folder: Path) -> Path:
    """Return the newest whole state of a run. Raises ValueError where there is none."""
    for name in (STATE, f"{STATE}.old"):
        if (folder / name / _TRAINED).is_file():
            return folder / name
    raise ValueError(f"{folder} has no state to resume from; expected {folder / STATE}; start it without --resume")
