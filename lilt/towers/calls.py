"""What one forward tells of a network: in which order its modules are called, and which of them give tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def watch(
    body: nn.Module, blocks: Iterable[str], forward: Callable[[], Any]
) -> tuple[dict[str, int], dict[str, int | None]]:
    """Run the network once in eval mode and without gradients; paths are those of `named_modules`.

    Returned are, for each module whose forward fires, the position of its first call; and for each of blocks the width
    D of the tokens (B, L, D) it gives, None where it gives something else.
    """
    order: dict[str, int] = {}
    widths: dict[str, int | None] = {}
    handles = []
    for path, module in body.named_modules():

        def note_call(_module: nn.Module, _args: Any, path: str = path) -> None:
            order.setdefault(path, len(order))

        handles.append(module.register_forward_pre_hook(note_call))
    for path in blocks:

        def note_width(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            widths[path] = _token_width(output)

        handles.append(body.get_submodule(path).register_forward_hook(note_width))
    training = body.training
    try:
        body.eval()
        with torch.no_grad():
            forward()
    finally:
        body.train(training)
        for handle in handles:
            handle.remove()
    return order, widths


def _token_width(output: Any) -> int | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first.shape[-1] if isinstance(first, torch.Tensor) and first.ndim == 3 else None
