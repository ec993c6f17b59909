"""The optimizer's part of a resume state where tensors are spread over ranks: the file that one process would write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import OPTIMIZER_NAME
from torch import Tensor

from lilt import distributed

FILE = f"{OPTIMIZER_NAME}.bin"


@contextmanager
def set_aside(accelerator: Accelerator) -> Iterator[None]:
    """Hide a sharded optimizer from Accelerate, which has a format of its own for it and asks for the model too."""
    kept = accelerator._optimizers
    if accelerator.is_fsdp2:
        accelerator._optimizers = []
    try:
        yield
    finally:
        accelerator._optimizers = kept


def save_moments(accelerator: Accelerator, folder: Path) -> None:
    """Write the state of a sharded optimizer as a whole; all ranks must call it."""
    if not accelerator.is_fsdp2:
        return
    state = accelerator._optimizers[0].state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        one = {name: distributed.whole(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        if accelerator.is_main_process:  # one tensor at a time: the others need not hold them all
            moments[number] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in one.items()}
    if accelerator.is_main_process:
        torch.save({**state, "state": moments}, folder / FILE)


def load_moments(accelerator: Accelerator, folder: Path) -> None:
    """Give each rank its share of what was written, by any engine."""
    if not accelerator.is_fsdp2:
        return
    optimizer = accelerator._optimizers[0]
    state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        pattern = trained[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim:  # a step count has no dimension
                values[name] = distributed.spread_like(value, pattern)
    optimizer.load_state_dict(state)
