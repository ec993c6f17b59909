"""What can be done to the blocks of both towers without another name: computed twice to save memory, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

from lilt.config import TrainConfig
from lilt.model import TwoTower
from lilt.towers.front import is_given


def treat_blocks(core: TwoTower, config: TrainConfig, accelerator: Accelerator) -> None:
    """Compile and checkpoint the blocks as configured, behind policies and engines; a launcher may ask for the latter.

    Raises ValueError where there is nothing to compile with.
    """
    if config.compile:
        check_backend(config.compile_backend, accelerator.device)
        compile_blocks(core, config.compile_backend)
    if config.checkpointing or (accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing):
        checkpoint_blocks(core)


def checkpoint_blocks(core: TwoTower) -> None:
    """Keep of each block its input alone and run it again on the way back, with the same dropout.

    What a policy has hung on a block is run with it.
    """
    for block in _blocks(core):
        # the slot that Module.compile uses: hooks are inside, names stay, and a copy does not take it along
        block._compiled_call_impl = partial(_again, block, block._compiled_call_impl or block._call_impl)


def _again(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # on the way back nothing stands in for the block any more: it would be run on what stood in for its input
    if is_given(block) or not torch.is_grad_enabled():
        return run(*args, **kwargs)

    def call(*values: Any) -> Any:
        return run(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    # by position: by it torch finds the device whose random state it has to keep
    return checkpoint(call, *args, *kwargs.values(), use_reentrant=False)


def compile_blocks(core: TwoTower, backend: str) -> None:
    """Compile each block at its first call, with what a policy or an engine has hung on it.

    Blocks and not towers: alike ones are compiled once, and what is between them may be anything.
    """
    import torch._dynamo  # it takes seconds, and most runs do without

    blocks = _blocks(core)
    # all blocks count as one function, in training and evaluation and with each length of captions
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
    for block in blocks:
        compiled = torch.compile(block._call_impl, backend=backend)
        block._compiled_call_impl = partial(_unless_changed, block, compiled, len(block._forward_hooks))


def _unless_changed(block: nn.Module, compiled: Callable[..., Any], hooks: int, *args: Any, **kwargs: Any) -> Any:
    # a frozen front is recorded by a hook and put back by another forward, for a call; that is not worth compiling
    changed = is_given(block) or len(block._forward_hooks) != hooks
    return (block._call_impl if changed else compiled)(*args, **kwargs)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError for a backend of torch.compile that is not there, or lacks its compiler."""
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(
            f"compile_backend={backend!r}; expected one of {', '.join(known)}; leave it out for inductor, or leave "
            "--compile out"
        )
    if backend != "inductor" or device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(
            f"--compile found no C++ compiler ({str(error).splitlines()[0]}); expected g++ or clang++, which inductor "
            "needs on CPU: install one or name it in the variable CXX, or leave --compile out"
        ) from error


def _blocks(core: TwoTower) -> list[nn.Module]:
    return [*core.vision.blocks, *core.text.blocks]
