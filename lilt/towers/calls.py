"""What one forward tells of a network: in which order its modules are called, what each is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class Traced:
    """One call of a module: its path, when it began and ended on a common clock, what was kept of both ends."""

    path: str
    began: int
    given: Any
    ended: int = -1
    gave: Any = None


def trace(
    body: nn.Module, forward: Callable[[], Any], keep: Callable[[Any], Any], gradients: bool = False
) -> list[Traced]:
    """Run the network once in eval mode and return the calls of its modules in the order in which they begin.

    keep says what is kept of all arguments of a call, a tuple, and of its output.
    """
    calls: list[Traced] = []
    running: list[Traced] = []
    clock = iter(range(10**9))
    handles = []
    for path, module in body.named_modules():

        def begin(_module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = path) -> None:
            running.append(Traced(path, next(clock), keep((*args, *kwargs.values()))))
            calls.append(running[-1])

        def end(_module: nn.Module, _args: tuple, output: Any) -> None:
            running[-1].gave, running[-1].ended = keep(output), next(clock)
            running.pop()

        # before all other hooks, so that both ends are the module's own
        handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(end, prepend=True))
    training = body.training
    try:
        body.eval()
        with torch.set_grad_enabled(gradients):
            forward()
    finally:
        body.train(training)
        for handle in handles:
            handle.remove()
    return calls


class Call(NamedTuple):
    """A module's place in the order of first calls, and the width D of the tokens (B, L, D) it reads and gives."""

    order: int
    reads: int | None = None  # None: something else
    gives: int | None = None


def watch(body: nn.Module, forward: Callable[[], Any]) -> dict[str, Call]:
    """Run the network once in eval mode and without gradients; return the modules whose forward fires by their path."""
    calls: dict[str, Call] = {}
    for call in trace(body, forward, _width):
        first = calls.setdefault(call.path, Call(len(calls), call.given))
        calls[call.path] = first._replace(gives=call.gave)
    return calls


def _width(values: Any) -> int | None:
    """Return the width of the first tensor among values, where that is tokens."""
    several = values if isinstance(values, (tuple, list)) else (values,)
    first = next((value for value in several if isinstance(value, Tensor)), None)
    # a nested tensor has no shape
    return first.shape[-1] if first is not None and first.ndim == 3 and not first.is_nested else None
