"""The resume state: everything that makes the next step the one it would have been."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from lilt import distributed
from lilt.checkpoint import flush, load_trained
from lilt.train.learner import Learner
from lilt.train.moments import load_moments, save_moments, set_aside

STATE, SUMS = "state", "sums.json"
_TRAINED = "trained.safetensors"


def keep_frozen_weights_out(accelerator: Accelerator, learner: Learner) -> None:
    """Hook into the accelerator's saving: only trained tensors are written, and only they are read."""

    def save(models: list[Any], weights: list[dict], folder: str) -> None:
        weights.clear()
        if not (accelerator.is_main_process or accelerator.is_fsdp2):  # where each has a share
            return
        tensors = {name: distributed.whole(p.detach()).cpu().contiguous() for name, p in learner.trained().items()}
        if accelerator.is_main_process:
            save_file(tensors, Path(folder) / _TRAINED)

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        load_trained(learner, load_file(Path(folder) / _TRAINED), folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_state(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write the state of a step under a temporary name, with the sum of each file, and rename it; keep the newest.

    States of later steps are of a sitting that was given up, for an earlier step was gone on from: they go.
    """
    states = folder / STATE
    fresh, target = states / f"step-{step:08d}.tmp", states / f"step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
        states.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    # DeepSpeed writes its own file of the model, which the hook does not see
    lean = {"exclude_frozen_parameters": True} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    with set_aside(accelerator):
        accelerator.save_state(str(fresh), safe_serialization=True, **lean)
    save_moments(accelerator, fresh)
    distributed.barrier()
    if accelerator.is_main_process:
        (fresh / SUMS).write_text(json.dumps(_sums(fresh)), encoding="utf-8")
        for file in fresh.rglob("*"):
            if file.is_file():
                flush(file)
        shutil.rmtree(target, ignore_errors=True)  # of a sitting that went on from an earlier step
        fresh.rename(target)
        there = sorted(states.glob("step-????????"), reverse=True)
        later, ours = there[: there.index(target)], there[there.index(target) :]
        for other in [*later, *ours[keep:], *states.glob("*.tmp")]:
            shutil.rmtree(other, ignore_errors=True)
    distributed.barrier()


def load_state(accelerator: Accelerator, state: Path) -> None:
    """Go on from a state, which any engine may have written."""
    lean = {"load_module_strict": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    with set_aside(accelerator):
        accelerator.load_state(str(state), **lean)
    load_moments(accelerator, state)


def find_state(folder: Path) -> tuple[Path, list[Path]]:
    """Return the newest whole state of a run, and newer ones that are torn. Raises ValueError where none is whole."""
    torn: list[Path] = []
    for state in sorted((folder / STATE).glob("step-????????"), reverse=True):
        if _is_whole(state):
            return state, torn
        torn.append(state)
    said = f"; {len(torn)} are torn (files missing or changed)" if torn else ""
    raise ValueError(
        f"{folder} has no state to resume from{said}; expected {folder / STATE}/step-…; start it without --resume"
    )


def _is_whole(state: Path) -> bool:
    try:
        return bool(json.loads((state / SUMS).read_text(encoding="utf-8")) == _sums(state))
    except (OSError, ValueError):
        return False


def _sums(state: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a state."""
    found = {}
    for file in sorted(f for f in state.rglob("*") if f.is_file() and f.name != SUMS):
        with file.open("rb") as stream:
            found[file.relative_to(state).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
