"""The engines that `accelerate config` names, made to fit: one process, DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lilt import distributed

if TYPE_CHECKING:
    from lilt.train.learner import Learner

ENCODING = ("encode_image", "encode_text")  # how a model is used beside its forward


def make_accelerator(precision: str) -> Accelerator:
    """Return Accelerate with the engine that was asked for; to be called before the towers are loaded.

    Raises ValueError for a precision or an engine that cannot be had.
    """
    # else transformers loads weights in the first process alone, and each has to know its own
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if sharding := parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if state.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate shards on devices of this type, and on CPU it would do DDP without a word
            state.distributed_type = DistributedType.MULTI_GPU
    # buffers are statistics of pretrained towers, which never change
    options = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=options)
    except ValueError as error:
        if "precision" not in str(error):
            raise
        raise ValueError(f"precision={precision} does not work here: {error}; use bf16 or no") from error
    if sharding:
        check_sharding(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and precision != "no":
        raise ValueError(
            f"precision={precision} came with DeepSpeed, which casts the towers themselves and with them what is "
            "trained; expected fp32: use --precision no, or launch with FSDP2 or DDP"
        )
    return accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """Raise ValueError for a kind of sharding that cannot be had."""
    plugin, mesh = getattr(accelerator.state, "fsdp_plugin", None), accelerator.parallelism_config
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"the launcher asks for FSDP {plugin.fsdp_version}; expected FSDP 2, which takes frozen and trained "
            "tensors together: set fsdp_version: 2 in the config of accelerate"
        )
    if mesh is not None and mesh.total_size != mesh.dp_replicate_size * mesh.dp_shard_size:
        raise ValueError(
            f"the launcher asks for tp_size={mesh.tp_size}, cp_size={mesh.cp_size}, sp_size={mesh.sp_size}; expected "
            "data parallelism alone, since each process takes rows of its own: set all three to 1"
        )


def spread(accelerator: Accelerator, learner: Learner) -> None:
    """Spread a learner over the processes where FSDP2 was asked for; before the optimizer is made.

    What is gathered together is known from the towers, a block at a time, and not read from the launcher's wrap policy.
    Tensors are gathered in fp32 and computed with under autocast, as in the other engines: a trained gain near 1 has
    three digits in bf16.
    """
    if not accelerator.is_fsdp2:
        return
    plugin, mesh, core = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh, learner.core
    options: dict[str, Any] = {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
    }
    distributed.shard(core, [*core.vision.blocks, *core.text.blocks], ENCODING, **options)
    if learner.distiller is not None:
        distributed.shard(learner.distiller, (), **options)
    plain = learner.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with accelerator.autocast():
            return plain(*args, **kwargs)

    learner.forward = forward  # type: ignore[method-assign]


def prepare(
    accelerator: Accelerator, learner: Learner, optimizer: Any, rows: int = 1, micro_batch: int | None = None
) -> tuple[nn.Module, Any]:
    """Return the learner and its optimizer in the wrapping of the engine; rows: those of a process in a step.

    Raises ValueError for micro-batches that the engine cannot do.
    """
    if accelerator.is_fsdp2:  # Accelerate's own way knows neither tensors without a dimension nor buffers
        return learner, accelerator.prepare_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if micro_batch is not None:
            raise ValueError(
                f"micro_batch={micro_batch} came with DeepSpeed, which updates the weights behind each backward pass; "
                "expected one pass a step; leave --micro_batch out, or launch with FSDP2 or DDP"
            )
        # else Accelerate wants to be given a loader to ask
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = rows
        with _unsent(learner):
            return tuple(accelerator.prepare(learner, optimizer))
    with warnings.catch_warnings():
        # torch 2.15 has another word for it, which Accelerate 1.15 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(learner, optimizer)
    return model, optimizer


@contextmanager
def _unsent(learner: Learner) -> Iterator[None]:
    """Keep tensors without a dimension out of DeepSpeed's first broadcast, which cannot send them; all ranks agree."""
    points: list[Any] = [p for p in learner.parameters() if not p.ndim]
    for point in points:
        point.ds_status = "elsewhere"
    try:
        yield
    finally:
        for point in points:
            del point.ds_status


@contextmanager
def gathered(accelerator: Accelerator, core: nn.Module) -> Iterator[None]:
    """Have a spread model whole on each rank: in an evaluation they have different numbers of batches."""
    if not accelerator.is_fsdp2:
        yield
        return
    with distributed.gathered(core, accelerator.state.fsdp_plugin.reshard_after_forward):
        yield


@contextmanager
def silent(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Let backward passes add up gradients without an exchange between ranks."""
    with distributed.unreduced(model) if accelerator.is_fsdp2 else accelerator.no_sync(model):
        yield


def finish(accelerator: Accelerator, model: nn.Module, all_of_them: bool = False) -> None:
    """Exchange the gradients that the engine has left out; behind the last backward pass of a step."""
    if accelerator.is_fsdp2 or all_of_them:
        distributed.average([p.grad for p in model.parameters() if p.grad is not None and not distributed.is_spread(p)])


def clip(accelerator: Accelerator, trained: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """Return the norm of the gradient, after it was cut down if that is asked for."""
    trained = list(trained)
    if largest is not None or accelerator.is_fsdp2:  # Accelerate knows norms of what is spread
        norm = accelerator.clip_grad_norm_(trained, math.inf if largest is None else largest)
    else:
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    # engines that clip on their own may say nothing
    return distributed.whole(norm) if isinstance(norm, Tensor) else torch.zeros((), device=accelerator.device)


def recover(accelerator: Accelerator, learner: Learner) -> None:
    """Let the engine begin anew after a step that an error has ended."""
    if accelerator.is_fsdp2:
        distributed.begin_anew([part for part in (learner.core, learner.distiller) if part is not None])
