"""AdamW groups and the learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lilt import distributed
from lilt.model import TwoTower

OPTIMIZERS = ("adamw", "adamw8bit")


def parameter_groups(
    model: TwoTower, lr: float | None, head_lr: float, weight_decay: float, beside: Iterable[Parameter] = ()
) -> list[dict]:
    """Group the trained parameters by learning rate and decay.

    Tower tensors take lr, or their policy's own where lr is None; projection and scale take head_lr, and so do those
    beside the model. Tensors of one dimension or none (norms, biases, the scale) are not decayed.
    """
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for parameter in beside:
        groups.setdefault((head_lr, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    for name, parameter in model.trained().items():
        side, _, path = name.partition(".body.")
        own = getattr(model, side).fates[path].lr if path else head_lr
        rate = lr if path and lr is not None else own
        groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in sorted(groups.items())]


def make_optimizer(
    model: TwoTower,
    lr: float | None,
    head_lr: float,
    weight_decay: float,
    beta2: float,
    beside: Iterable[Parameter] = (),
    kind: str = "adamw",
) -> Optimizer:
    """Return an optimizer over the trained parameters: AdamW, fused where the device has it, or with 8-bit moments."""
    if kind == "adamw8bit":
        return _eight_bit(parameter_groups(model, lr, head_lr, weight_decay, beside), beta2)
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return AdamW(parameter_groups(model, lr, head_lr, weight_decay, beside), betas=(0.9, beta2), fused=fused)


def _eight_bit(groups: list[dict], beta2: float) -> Optimizer:
    if any(distributed.is_spread(parameter) for group in groups for parameter in group["params"]):
        raise ValueError(
            "optimizer=adamw8bit came with FSDP2, which shares the moments out by itself; expected one of the two; "
            "leave --optimizer out, or launch with DDP"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer=adamw8bit needs bitsandbytes, which is not installed; expected it beside lilt; "
            "pip install 'lilt[bitsandbytes]', or leave --optimizer out"
        ) from error
    made: Optimizer = AdamW8bit(groups, betas=(0.9, beta2))
    return made


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int, floor: float) -> LambdaLR:
    """Return linear warm-up from floor to 1 and a cosine back to floor, as factors of each group's peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return floor + (1 - floor) * step / warmup
        through = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * through))

    return LambdaLR(optimizer, factor)
