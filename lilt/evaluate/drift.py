"""Drift: how far each block's tokens have moved from those of the tower before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilt import distributed
from lilt.data import TokenTable
from lilt.evaluate.cka import Moments
from lilt.evaluate.rows import at_rest
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values, register
from lilt.policies import merge
from lilt.towers import ImageContract, Inputs, Tower

POOLED = "pooled"


@register("drift")
@dataclass(frozen=True)
class Drift(OnData):
    """Compare the tokens of each block, and the pooled output, of each tower with those of its base by linear CKA.

    1 is no drift but a rotation or a scale. samples images and as many captions are looked at, evenly spaced. A block
    is judged by all its tokens; the pooled output has one row a sample, and with fewer of them than it is wide, CKA
    reads high.
    """

    split: str | None = None
    samples: int = 256

    def measure(self, subject: Subject) -> Values:
        if self.samples < 2:
            raise ValueError(f"drift(samples={self.samples}): expected at least 2 to compare; give some hundred")
        samples = self.read_samples(subject, self.split)
        some = evenly(samples, self.samples)
        texts = evenly(sorted({caption for sample in samples for caption in sample.captions}), self.samples)
        for side, (tower, base) in subject.bases().items():
            moments = self._moments(subject, tower, base, some if side == "vision" else texts)
            yield from ((f"{side}/{name}", value.cka()) for name, value in moments.items())
            yield f"num_{side}", moments[POOLED].count

    def _moments(
        self, subject: Subject, tower: Tower, base: nn.Module | None, items: Sequence[Any]
    ) -> dict[str, Moments]:
        gathered: dict[str, Moments] = {}
        if isinstance(tower.contract, ImageContract):

            def compare(images: Tensor, index: Tensor) -> Tensor:
                _add(gathered, compared(tower, base, images))
                return torch.zeros(len(images))

            rows = subject.see("drift", [str(sample.image) for sample in items], compare)
            if len(rows.which) < 2:
                first = f" (first fault: {rows.faults[0]})" if rows.faults else ""
                raise ValueError(
                    f"drift: {len(rows.which)} of {len(items)} images could be read{first}; expected at least 2 to "
                    "compare; check image_root"
                )
        else:
            table = TokenTable(items, tower.contract, subject.model.config.eval_tokens)
            mine = range(distributed.rank(), len(items), distributed.world_size())
            with subject.setting.bar("drift: texts", len(items)) as advance, at_rest(subject.core) as device:
                for start in range(0, len(mine), subject.setting.batch_size):
                    some = mine[start : start + subject.setting.batch_size]
                    tokens = tower.contract.pad([table[i] for i in some])
                    _add(gathered, compared(tower, base, {k: v.to(device) for k, v in tokens.items()}))
                    advance(len(some))
        joined: dict[str, Moments] = {}
        for share in distributed.gather_objects(gathered):
            _add(joined, share)
        return joined


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return count of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def _add(gathered: dict[str, Moments], more: dict[str, Moments]) -> None:
    for name, moments in more.items():
        gathered[name] = gathered[name] + moments if name in gathered else moments


@torch.no_grad()
def compared(tower: Tower, base: nn.Module | None, inputs: Inputs) -> dict[str, Moments]:
    """Run a tower and its base on a batch; rows are the real tokens of each block, and the pooled outputs."""
    with blocks_watched(tower) as seen:
        tuned = {POOLED: tower(inputs)} | dict(seen)
        seen.clear()
        with merge.disabled(tower, base):
            before = {POOLED: tower(inputs)} | dict(seen)
    mask = None if isinstance(inputs, Tensor) else inputs["attention_mask"].bool()
    longer = any(tuned[name].shape != tokens.shape for name, tokens in before.items())
    prefix = tower.tokens(inputs).prefix if longer else 0
    names = [*seen, POOLED]
    return {name: Moments.of(*_rows(before[name], tuned[name], mask, prefix)) for name in names}


def _rows(before: Tensor, tuned: Tensor, mask: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of both as rows (N, W): of real tokens, without prompts, which stand behind the prefix."""
    if before.ndim == 3 and tuned.shape[1] > before.shape[1]:
        more = tuned.shape[1] - before.shape[1]
        tuned = torch.cat([tuned[:, :prefix], tuned[:, prefix + more :]], dim=1)
    if before.ndim == 4:  # a grid (B, C, H, W) or (B, H, W, C): its sides are equal, mostly
        channels_first = before.shape[2] == before.shape[3] or before.shape[1] != before.shape[2]
        before, tuned = ((t.movedim(1, -1) if channels_first else t) for t in (before, tuned))
    if before.ndim == 3 and mask is not None and mask.shape == before.shape[:2]:
        return before[mask], tuned[mask]
    return before.flatten(0, -2), tuned.flatten(0, -2)


@contextmanager
def blocks_watched(tower: Tower) -> Iterator[dict[str, Tensor]]:
    """Keep what each block gives, in depth order, in the forward that runs inside."""
    seen: dict[str, Tensor] = {}
    handles = []
    for number, block in enumerate(tower.blocks):

        def keep(_module: nn.Module, _args: Any, output: Any, number: int = number) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            seen[f"block {number}"] = first.detach()

        handles.append(block.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
