"""What one forward tells of a network: in which order its modules are called, and which of them work on tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """A module's place in the order of first calls, and the width D of the tokens (B, L, D) it reads and gives."""

    order: int
    reads: int | None = None  # None: something else
    gives: int | None = None


def watch(body: nn.Module, forward: Callable[[], Any]) -> dict[str, Call]:
    """Run the network once in eval mode and without gradients; return the modules whose forward fires by their path."""
    calls: dict[str, Call] = {}
    handles = []
    for path, module in body.named_modules():

        def note_call(_module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = path) -> None:
            calls.setdefault(path, Call(len(calls), _width((*args, *kwargs.values()))))

        def note_output(_module: nn.Module, _args: tuple, output: Any, path: str = path) -> None:
            calls[path] = calls[path]._replace(
                gives=_width(output[:1] if isinstance(output, (tuple, list)) else (output,))
            )

        handles.append(module.register_forward_pre_hook(note_call, with_kwargs=True))
        handles.append(module.register_forward_hook(note_output))
    training = body.training
    try:
        body.eval()
        with torch.no_grad():
            forward()
    finally:
        body.train(training)
        for handle in handles:
            handle.remove()
    return calls


def _width(values: Any) -> int | None:
    first = next((value for value in values if isinstance(value, Tensor)), None)
    # a nested tensor has no shape
    return first.shape[-1] if first is not None and first.ndim == 3 and not first.is_nested else None
