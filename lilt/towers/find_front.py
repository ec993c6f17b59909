"""How far a tower is frozen from its input on, found by looking and proved by trying."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lilt.towers.base import ImageContract, Inputs, Tower
from lilt.towers.calls import Traced, trace
from lilt.towers.front import Front, Shape
from lilt.towers.loading import fixed_seed


def find_front(tower: Tower, tokens: bool = False) -> Front | None:
    """Return the frozen front of a tower with its policy applied, as far as it can be put back; None: there is none.

    tokens: its tokens are read behind it, so that the pooled features of a locked tower do not stand for all of it.

    Which blocks are frozen is read from a forward: their outputs need no gradient. That the rest of the tower needs
    nothing else from the front is proved by a comparison, on inputs of two sizes; a relative position bias that a first
    block hands on, for one, makes it fail, and then fewer modules are skipped, or none.
    """
    if is_locked(tower) and not tokens:
        return Front(tower, "", blind=True, still=frozenset(path for path, _ in tower.body.named_modules()))
    seen = _Watch(tower)
    if seen.last is None:
        return None
    plain = Front(tower, seen.last, seen.as_tuple, still=seen.still())
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

    def still(self) -> frozenset[str]:
        """Return the modules that no call outside of the front uses."""
        border = next(call for call in self.calls if call.path == self.last).ended
        later = {call.path for call in self.calls if call.ended > border}
        found = {call.path for call in self.calls} - later
        for path, _ in self.tower.body.named_modules():  # what is never called belongs to what it is in
            if path not in later and path.rpartition(".")[0] in found:
                found.add(path)
        return frozenset(found)

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
    """Say whether a front always gives the same, and a tower that begins behind it what it gives from the start."""
    tower = front.tower
    modes = [(module, module.training) for module in tower.modules()]
    still, tower.still = tower.still, front.still
    try:
        tower.train()
        with fixed_seed():
            inputs = _inputs(tower, 2)
            if not torch.equal(front.record(inputs), front.record(inputs)):
                return False  # dropout that no module of the front switches off
        tower.eval()
        for rows in (2, 3):
            inputs = _inputs(tower, rows)
            with front.recording() as kept:
                expected = tower(inputs)
            stored = front.record(inputs)
            if not torch.allclose(kept[0], stored):
                return False  # what comes behind works on it in place
            with front.resumed(stored):
                again = tower(front.blank(stored) if front.blind else inputs)
            if not torch.allclose(again, expected, rtol=1e-5, atol=1e-6):
                return False
    except (RuntimeError, TypeError, IndexError, AttributeError):
        return False  # the library looks into what was left out
    finally:
        tower.still = still
        for module, mode in modes:
            module.training = mode
    return True
