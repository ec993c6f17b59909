"""The frozen front of a tower: what it computes never changes in training, so once is enough."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tower

Shape = tuple[tuple[int, ...], torch.dtype]  # of what one sample becomes, without the axis of the batch


@dataclass(frozen=True)
class Front:
    """Everything up to the output of the block `last`, which no trained tensor can change; the whole tower where that
    is empty.

    still: what works in the front alone and is therefore in eval mode in training too.
    skipped modules need not run once that output is put back. They are named with the shape of what each gives for one
    sample (None: the same as the last block), so that the library's own lines between them find what they expect.
    blind: with all of them skipped nothing looks at the values of the input any more.
    """

    tower: Tower
    last: str
    as_tuple: bool = False  # the last block gives (tokens,)
    skipped: dict[str, Shape | None] = field(default_factory=dict)
    blind: bool = False
    still: frozenset[str] = frozenset()

    @property
    def module(self) -> nn.Module:
        """Return the module whose output is kept."""
        module: nn.Module = self.tower.body.get_submodule(self.last) if self.last else self.tower
        return module

    @torch.no_grad()
    def record(self, inputs: Inputs) -> Tensor:
        """Run the front alone and return the output of its last block, such as (B, L, W); (B, W) of a whole tower."""
        with self.recording(stop=True) as kept, suppress(_EndError):
            self.tower(inputs)
        return kept[0]

    @contextmanager
    def recording(self, stop: bool = False) -> Iterator[list[Tensor]]:
        """Keep the output of the last block of the front in the forward that runs inside; or end that forward there."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            kept.append(output[0] if self.as_tuple else output)
            if stop:
                raise _EndError

        # before the hooks of a policy: what they add to this output is trained
        handle = self.module.register_forward_hook(keep, prepend=True)
        try:
            yield kept
        finally:
            handle.remove()

    @contextmanager
    def resumed(self, stored: Tensor) -> Iterator[None]:
        """Let the forward inside begin behind the front, with what was recorded."""
        places = [(self.tower.body.get_submodule(path), shape) for path, shape in self.skipped.items()]
        places.append((self.module, None))
        own = {module: vars(module)["forward"] for module, _ in places if "forward" in vars(module)}
        try:
            for module, shape in places:
                module.forward = _given(module.forward, stored, shape, self.as_tuple)
            yield
        finally:
            for module, _ in places:
                del module.forward
            for module, forward in own.items():
                module.forward = forward

    def blank(self, stored: Tensor) -> Tensor:
        """Return images for a blind front: zeros of the right shape that take no memory."""
        example = self.tower.example()
        assert self.blind and isinstance(example, Tensor)
        return torch.zeros((), device=stored.device).expand(len(stored), *example.shape[1:])


def is_given(module: nn.Module) -> bool:
    """Say whether what is stored stands in for a module's forward at this moment."""
    return hasattr(vars(module).get("forward"), "stored")


class _EndError(Exception):
    """Ends a forward early."""


def _given(forward: Callable[..., Any], stored: Tensor, shape: Shape | None, as_tuple: bool) -> Callable[..., Any]:
    """Return what stands in for a module's forward: it gives what is stored, or zeros of the shape of the real thing.

    It keeps the signature, from which the hooks of policies read what is what.
    """

    @functools.wraps(forward)
    def give(*args: Any, **kwargs: Any) -> Any:
        if shape is None:
            return (stored,) if as_tuple else stored
        sizes, dtype = shape
        return torch.zeros((), dtype=dtype, device=stored.device).expand(len(stored), *sizes)

    give.stored = stored  # type: ignore[attr-defined]
    return give
