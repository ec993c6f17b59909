"""Rank, world size and gathering; the only file that touches collectives."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the index of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this process writes the files; before the group exists the launcher's variable tells."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; backward sums every rank's gradient of our rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # gloo has no reduce_scatter; all_reduce and a slice are exact everywhere, and embeddings are small
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(tensor: Tensor) -> Tensor:
    """Join the equal-sized rows (B, …) of all ranks to (W * B, …) in rank order; differentiable."""
    if world_size() == 1:
        return tensor
    joined: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return joined


def gather_objects(item: Any) -> list[Any]:
    """Return the items of all ranks in rank order; for small things of any type."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def mean(value: Tensor) -> Tensor:
    """Return the mean of a scalar over ranks."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def use_all_cores() -> None:
    """Undo what `accelerate launch` does unasked to a lone CPU process: OMP_NUM_THREADS=1, one core for all.

    Other launchers, several processes and a larger number are left alone; so is everything on an accelerator.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and world_size() == 1 and not torch.accelerator.is_available():
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
