"""Rank, world size and gathering; the only file that touches collectives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Return the index of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    """Return how many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Say whether this process writes the files; before the group exists the launcher's variable tells."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """End the group of processes, if there is one: the last thing of a program that went well on all ranks.

    Without it gloo's threads now and then abort a process at its exit, and the launcher calls a finished run failed.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over ranks."""
    if world_size() == 1:
        return
    for tensor in tensors:
        # as DDP does: what is divided by a power of two before the sum has the same bits
        tensor.detach().div_(world_size())
        dist.all_reduce(tensor.detach())


class HostGroup:
    """Lets ranks ask one another something without a wait for their devices."""

    def __init__(self) -> None:
        """All ranks must make it at once."""
        self.world = world_size()
        # of its own: another exchange may be under way in the other group when one rank asks
        self.group: Any = dist.new_group(backend="gloo") if self.world > 1 else None

    def any(self, turn: int, *said: bool, patience: timedelta | None = None) -> tuple[bool, ...]:
        """Say of each question whether any rank said yes.

        Raises RuntimeError when not all have answered in time, or to another turn.
        """
        if self.world == 1:
            return said
        told = torch.tensor([turn, -turn, *said])
        work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group, async_op=True)
        if patience is None:
            work.wait()
        else:
            work.wait(patience)
        latest, earliest, *answers = told.tolist()
        if latest != -earliest:
            raise RuntimeError(f"ranks are at different turns, from {-earliest} to {latest}")
        return tuple(map(bool, answers))


def shard(model: nn.Module, units: Iterable[nn.Module], methods: Iterable[str] = (), **options: Any) -> None:
    """Spread the tensors of a model over all ranks (FSDP2): those of a unit are whole while it runs, the rest while the
    model does.

    Tensors without a dimension have nothing to spread and stay whole; the caller has to `average` their gradients.
    methods: those of the model that are called beside forward. options: of torch's fully_shard.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    options["ignored_params"] = {p for p in model.parameters() if not p.ndim}
    for unit in units:
        fully_shard(unit, **options)
    # None: kept whole between a forward and its backward, which begins with it
    root: Any = fully_shard(model, **{**options, "reshard_after_forward": None})
    for method in methods:
        register_fsdp_forward_method(model, method)
    # the first module to run becomes the root, and that may be a part which somebody calls by itself
    root._get_fsdp_state()._lazy_init()


def shards(model: nn.Module) -> list[Any]:
    """Return the modules that `shard` has spread, as torch's FSDPModule; on the plain path there are none."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def begin_anew(roots: Iterable[nn.Module]) -> None:
    """Forget a forward or backward pass of what is spread that an error has ended."""
    for root in roots:
        part: Any = root
        if not hasattr(part, "reset_iter_state"):
            raise ValueError(
                f"torch {torch.__version__} cannot go on after an error in a sharded model; expected torch 2.13 or "
                "later; start again with half the --micro_batch, or upgrade torch"
            )
        part.reset_iter_state()


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Let backward passes of what is spread add up gradients without an exchange."""
    parts = shards(model)
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def gathered(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Keep what `shard` has spread whole for a while, so that ranks may run the model different numbers of times.

    reshard_after_forward: that of its units.
    """
    parts = shards(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshard_after_forward and part is not model, recurse=False)
            part.reshard()


def is_spread(tensor: Tensor) -> bool:
    """Say whether each rank holds a share of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one, even if it is spread; then all ranks must call it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def ours(tensor: Tensor) -> Tensor:
    """Return the share of this rank of a tensor that is spread, which may be empty; any other as it is."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return a tensor that all ranks hold spread as a pattern is."""
    if not is_spread(pattern):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    # without a source rank: each takes its share of its own copy, and nothing is sent
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def use_all_cores() -> None:
    """Undo what `accelerate launch` does unasked to a lone CPU process: OMP_NUM_THREADS=1, one core for all.

    Other launchers, several processes and a larger number are left alone; so is everything on an accelerator.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and world_size() == 1 and not torch.accelerator.is_available():
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
