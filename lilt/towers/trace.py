"""The calls of one forward in order, each with what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Traced:
    """One call of a module: its path, when it began and ended on a common clock, what came out."""

    path: str
    began: int
    ended: int = -1
    output: Any = None


def trace(body: nn.Module, forward: Callable[[], Any]) -> list[Traced]:
    """Run the network once in eval mode, with gradients, and return the calls of its modules in order."""
    calls: list[Traced] = []
    running: list[Traced] = []
    clock = iter(range(10**9))
    handles = []
    for path, module in body.named_modules():

        def begin(_module: nn.Module, _args: Any, path: str = path) -> None:
            running.append(Traced(path, next(clock)))
            calls.append(running[-1])

        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            running[-1].output, running[-1].ended = output, next(clock)
            running.pop()

        # before all other hooks, so that an output is the module's own
        handles.append(module.register_forward_pre_hook(begin, prepend=True))
        handles.append(module.register_forward_hook(end, prepend=True))
    training = body.training
    try:
        body.eval()
        with torch.enable_grad():
            forward()
    finally:
        body.train(training)
        for handle in handles:
            handle.remove()
    return calls
