"""The frozen front of a tower: what it computes never changes in training, so once is enough."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lilt.towers.base import ImageContract, Inputs, Tower
from lilt.towers.calls import Traced, trace

Shape = tuple[tuple[int, ...], torch.dtype]  # of what one sample becomes, without the axis of the batch


@dataclass(frozen=True)
class Front:
    """Everything up to the output of the block `last`, which no trained tensor can change.

    skipped modules need not run once that output is put back. They are named with the shape of what each gives for one
    sample (None: the same as the last block), so that the library's own lines between them find what they expect.
    blind: with all of them skipped nothing looks at the values of the input any more.
    """

    tower: Tower
    last: str
    as_tuple: bool = False  # the last block gives (tokens,)
    skipped: dict[str, Shape | None] = field(default_factory=dict)
    blind: bool = False

    @torch.no_grad()
    def record(self, inputs: Inputs) -> Tensor:
        """Run the front alone and return the output of its last block, such as (B, L, W)."""
        with self.recording(stop=True) as kept, suppress(_EndError):
            self.tower.run(inputs)
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
        handle = self.tower.body.get_submodule(self.last).register_forward_hook(keep, prepend=True)
        try:
            yield kept
        finally:
            handle.remove()

    @contextmanager
    def resumed(self, stored: Tensor) -> Iterator[None]:
        """Let the forward inside begin behind the front, with what was recorded."""
        shapes: dict[str, Shape | None] = {**self.skipped, self.last: None}
        modules = {path: self.tower.body.get_submodule(path) for path in shapes}
        try:
            for path, module in modules.items():
                module.forward = _given(module.forward, stored, shapes[path], self.as_tuple)
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)

    def blank(self, stored: Tensor) -> Tensor:
        """Return images for a blind front: zeros of the right shape that take no memory."""
        example = self.tower.example()
        assert self.blind and isinstance(example, Tensor)
        return torch.zeros((), device=stored.device).expand(len(stored), *example.shape[1:])


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

    return give


def find_front(tower: Tower) -> Front | None:
    """Return the frozen front of a tower with its policy applied, as far as it can be put back; None: there is none.

    Which blocks are frozen is read from a forward: their outputs need no gradient. That the rest of the tower needs
    nothing else from the front is proved by a comparison, on inputs of two sizes; a relative position bias that a first
    block hands on, for one, makes it fail, and then fewer modules are skipped, or none.
    """
    seen = _Watch(tower)
    if seen.last is None:
        return None
    plain = Front(tower, seen.last, seen.as_tuple)
    # text is embedded anew: a table lookup costs nothing, and what is made beside it depends on the length
    candidates = [replace(plain, skipped=dict.fromkeys(seen.blocks_before()))]
    if isinstance(tower.contract, ImageContract):
        candidates.insert(0, replace(plain, skipped=seen.all_before(), blind=True))
    return next((front for front in candidates if _proved(front)), None)


def is_locked(tower: Tower) -> bool:
    """Say whether no trained tensor is in a tower."""
    return not any(p.requires_grad for p in tower.parameters())


class _Watch:
    """One forward of two inputs, and what it tells of the calls before the last frozen block."""

    def __init__(self, tower: Tower):
        self.tower = tower
        self.calls = self._run(2)
        blocks = [call for call in self.calls if call.path in tower.anatomy.blocks]
        frozen = []
        for call in sorted(blocks, key=lambda call: call.ended):
            if _first(call.gave).requires_grad:
                break
            frozen.append(call)
        self.frozen = frozen
        once = len({call.path for call in blocks}) == len(blocks)  # a block that is called again has no one place
        fits = bool(frozen) and once and _is_single(frozen[-1].gave)
        self.last = frozen[-1].path if fits else None
        self.as_tuple = bool(frozen) and not isinstance(frozen[-1].gave, Tensor)

    def _run(self, rows: int) -> list[Traced]:
        inputs = _inputs(self.tower, rows)
        return trace(self.tower.body, lambda: self.tower.run(inputs), lambda values: values, gradients=True)

    def blocks_before(self) -> list[str]:
        """Return the frozen blocks before the last one."""
        return [call.path for call in self.frozen[:-1]]

    def all_before(self) -> dict[str, Shape | None]:
        """Return the outermost modules that end before the last frozen block begins, with what they give."""
        assert self.last is not None
        border = next(call for call in self.calls if call.path == self.last).began
        again = {call.path for call in self.calls if call.began > border}
        found: dict[str, Shape | None] = {}
        until = -1
        more = {call.path: call for call in self._run(3)}
        for call in self.calls:
            if call.began > until and call.ended < border and call.path not in again:
                shape = _sample_shape(call.gave, more[call.path].gave)
                if shape is not None:
                    found[call.path] = shape
                    until = call.ended  # what is inside is skipped with it
        return found


def _inputs(tower: Tower, rows: int) -> Inputs:
    """Return so many inputs that differ: noise, or captions of several lengths."""
    example = tower.example()
    generator = torch.Generator().manual_seed(rows)
    if isinstance(example, Tensor):
        if example.is_meta:
            return example.expand(rows, *example.shape[1:])
        noise = torch.randn(rows, *example.shape[1:], generator=generator)
        return noise.to(next(tower.parameters()).device)
    captions = ["a photo of a red boat", "two dogs", "a long line of people in front of a small house"]
    assert not isinstance(tower.contract, ImageContract)
    tokens = tower.contract.pad(tower.contract.encode(captions[:rows])[0])
    return {key: value.to(next(tower.parameters()).device) for key, value in tokens.items()}


def _first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _is_single(output: Any) -> bool:
    """Say whether a block gives one tensor and nothing beside it."""
    return isinstance(output, Tensor) or (
        isinstance(output, tuple) and isinstance(output[0], Tensor) and len(output) == 1
    )


def _sample_shape(two: Any, three: Any) -> Shape | None:
    """Return the shape for one sample of what two and three samples gave; None: it is not one tensor with a batch."""
    if not (isinstance(two, Tensor) and isinstance(three, Tensor)) or two.ndim == 0:
        return None
    if (len(two), len(three)) != (2, 3) or two.shape[1:] != three.shape[1:]:
        return None
    return tuple(two.shape[1:]), two.dtype


@torch.no_grad()
def _proved(front: Front) -> bool:
    """Say whether a tower that begins behind its front gives what it gives from the start."""
    tower = front.tower
    training = tower.training
    try:
        tower.eval()
        for rows in (2, 3):
            inputs = _inputs(tower, rows)
            expected = tower(inputs)
            stored = front.record(inputs)
            with front.resumed(stored):
                again = tower(front.blank(stored) if front.blind else inputs)
            if not torch.allclose(again, expected, rtol=1e-5, atol=1e-6):
                return False
    except (RuntimeError, TypeError, IndexError, AttributeError):
        return False  # the library looks into what was left out
    finally:
        tower.train(training)
    return True
