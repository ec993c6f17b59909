"""One row of the comparison: what a policy trains on a pair of towers, and what a step of it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lilt.budgets.cost import Cost
from lilt.model import TwoTower

_PER_VALUE = 4  # bytes: masters, gradients and both moments of AdamW are fp32


@dataclass(frozen=True)
class Budget:
    """The budget of one policy; bytes are those of fp32 training with AdamW."""

    policy: str
    trainable: int  # values trained in both towers, the projection and the scale
    total: int  # values of the whole model, with what the policy adds
    percent: float
    adapter_bytes: int  # size of adapter.safetensors
    optimizer_bytes: int
    step_flops_ratio: float  # matmul FLOPs of a step, relative to `full` on the same towers
    saved_bytes: int  # activations kept for backward at the given batch
    step_bytes: int  # weights + gradients + optimizer + saved activations


def adapter_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size that these tensors have as a safetensors file written by `lilt.checkpoint`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):  # the order of the file decides how many digits the offsets have
        start, end = end, end + tensor.nbytes
        assert tensor.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end  # the length, the header padded to a multiple of 8, the data


def budget(name: str, core: TwoTower, cost: Cost, full: Cost) -> Budget:
    """Return the budget of a model with its policies applied from the costs of its step and of a full one."""
    trained = core.trained()
    trainable = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in core.parameters())
    weights = sum(tensor.nbytes for tensor in (*core.parameters(), *core.buffers()))
    return Budget(
        policy=name,
        trainable=trainable,
        total=total,
        percent=100 * trainable / total,
        adapter_bytes=adapter_bytes(trained),
        optimizer_bytes=2 * _PER_VALUE * trainable,
        step_flops_ratio=cost.flops / full.flops,
        saved_bytes=cost.saved_bytes,
        step_bytes=weights + 3 * _PER_VALUE * trainable + cost.saved_bytes,
    )
