"""Learned tokens among those of a tower: they go in before its first block, or before each, and come out after."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilt.policies.attach import Child, attach, detach
from lilt.policies.base import Plan, Policy, register
from lilt.policies.edits import Edit
from lilt.policies.lengthen import Gap, cut, lengthen, names_of, splice
from lilt.policies.trial import TROUBLE, first_line, fixing, pair, position_table, watch
from lilt.registry import nearest
from lilt.towers.base import Inputs, Tower
from lilt.towers.loading import fixed_seed

DEPTHS = ("shallow", "deep")
SAME = 1e-4  # of the largest output: a smaller difference is rounding


@dataclass(frozen=True)
class Place:
    """Where prompts stand: before which token, how many lead without content, and which axis of an input has tokens."""

    at: int = 0
    prefix: int = 0
    axis: int = 1


class Prompts(Child):
    """Around one block: n tokens go in if it enters, come out if it leaves, and the masks between fit."""

    def __init__(self, n: int, width: int, place: Place, enters: bool, leaves: bool):
        super().__init__()
        self.n, self.place, self.enters, self.leaves = n, place, enters, leaves
        if enters:
            # Xavier's bound for a square map; the source's own for patches of as many values as a token has
            bound = math.sqrt(3 / width)
            self.tokens = nn.Parameter(torch.empty(n, width).uniform_(-bound, bound))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of the block's call with prompts among its tokens."""
        names = names_of(module, args)
        given = dict(zip(names, args, strict=True)) | kwargs
        key = next(key for key, value in given.items() if isinstance(value, Tensor))
        hidden, at, axis = given[key], self.place.at, self.place.axis
        # from the shapes of this very call: a checkpointed block is run again in backward
        gap = Gap(at, self.n, hidden.shape[axis] - (0 if self.enters else self.n), self.place.prefix)
        longer = lengthen({k: v for k, v in given.items() if k != key}, gap)
        if self.enters:
            tokens = self.tokens.to(hidden).unsqueeze(1 - axis)
            shape = [self.n if i == axis else size for i, size in enumerate(hidden.shape)]
            hidden = splice(hidden, tokens.expand(shape), at, axis)
        longer[key] = hidden
        return tuple(longer[name] for name in names), {k: longer[k] for k in kwargs}

    def after(self, output: Any) -> Any:
        """Return the block's output without the prompts where they leave."""
        if not self.leaves:
            return output
        hidden = cut(output if isinstance(output, Tensor) else output[0], self.place.at, self.n, self.place.axis)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


@dataclass(frozen=True)
class Insert(Edit):
    """Put prompts in before the first of some blocks and out after the last, or fresh ones around each."""

    name: str
    blocks: tuple[str, ...]
    n: int
    width: int
    place: Place
    deep: bool

    @property
    def claim(self) -> str:
        return f"{self.path}.{self.name}"

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        trained: list[nn.Parameter] = []
        for path in self.blocks:
            enters, leaves = (self.deep or path == end for end in (self.blocks[0], self.blocks[-1]))
            child = Prompts(self.n, self.width, self.place, enters, leaves)
            child.name = self.name
            attach(body.get_submodule(path), self.name, child, "around")
            trained += child.parameters()
        return trained

    def undo(self, body: nn.Module) -> None:
        """Take all of it away again."""
        for path in self.blocks:
            detach(body.get_submodule(path), self.name)

    def switch(self, body: nn.Module, on: bool) -> None:
        for path in self.blocks:
            getattr(body.get_submodule(path), self.name).off = not on

    def fold(self, body: nn.Module) -> None:
        raise NotImplementedError("no weight holds a prompt, and the policy says so")

    def rescale(self, body: nn.Module, factor: float) -> None:
        raise NotImplementedError("no part of a prompt leads back to the base, and check_scalable says so")

    def check_scalable(self, factor: float) -> None:
        if factor != 1:
            raise ValueError(
                f"prompt: scale={factor}; a prompt is a token that is read or not, and no part of it leads back to "
                "the base; expected scale=1; leave the scale out, or train a policy that adds to weights, such as lora"
            )


@register("prompt")
@dataclass(frozen=True)
class Prompt(Policy):
    """Train n new tokens that every other token reads; the tower itself stays.

    depth=shallow: they enter before the first block; deep: fresh ones before each, in place of what became of the last.
    They stand behind an image's class and register tokens, in front of a caption, and are gone before the pooling.
    Count: n * d, times the blocks if deep. Each lengthens the sequence that the blocks work on.
    Source: Jia et al. 2022, arXiv 2203.12119 (VPT); Li & Liang 2021, arXiv 2101.00190, for captions.
    """

    n: int = 8
    depth: str = "shallow"
    lr: ClassVar[float] = 5e-3
    identity_at_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    size: ClassVar[str | None] = "n"

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(
                f"prompt: unknown depth {self.depth!r}; known: {', '.join(DEPTHS)}.{nearest(self.depth, DEPTHS)}"
            )
        if self.n < 1:
            raise ValueError(f"prompt: n={self.n}; expected at least 1 token; give 8")

    def plan(self, tower: Tower) -> Plan:
        width, blocks = tower.anatomy.token_width, tower.anatomy.blocks
        if width is None:
            raise self.nothing(tower, "blocks that give tokens (B, L, D)")
        inputs = pair(tower)
        place, length = self._place(tower, inputs)
        deep = self.depth == "deep"
        count = self.n * width * (len(blocks) if deep else 1)
        why = f"{self.n} tokens {'before each block' if deep else 'before the first block'}"
        edit = Insert(blocks[0], count, self.name, why, self.lr, "prompt", blocks, self.n, width, place, deep)
        if length is not None:
            self._try(tower, inputs, replace(edit, name="prompt_trial"), length)
        return Plan((edit,))

    def _place(self, tower: Tower, inputs: Inputs) -> tuple[Place, int | None]:
        """Run the tower and see how its blocks are called; the length is None where nothing can be run."""
        try:
            tokens, shapes = watch(tower, inputs)
        except TROUBLE as error:
            if next(tower.body.parameters()).device.type == "meta":
                return Place(), None  # some libraries look at the values of a mask, and here there are none
            raise self.nothing(tower, f"tokens to stand among (its forward stops: {first_line(error)})") from error
        if any(shape != shapes[0] or len(shape) != 3 for shape in shapes) or len(shapes) != 2 * len(tower.blocks):
            seen = ", ".join(str(shape) for shape in dict.fromkeys(shapes))
            raise self.nothing(tower, f"blocks that run once each and on the same tokens (two examples gave {seen})")
        # two examples tell the axes apart
        axis = 1 if shapes[0][0] == 2 else 0
        if shapes[0][1 - axis] != 2:
            raise self.nothing(tower, f"blocks that work on whole examples (two of them gave {shapes[0]})")
        return Place(tokens.prefix, tokens.prefix, axis), shapes[0][axis]

    def _try(self, tower: Tower, inputs: Inputs, edit: Insert, length: int) -> None:
        """Run the tower with the prompts and take them away again; an image has no place for them, so any must do."""
        room = f"room for {self.n} more tokens in its blocks"
        if table := position_table(tower):
            raise self.nothing(tower, f"{room} ({table} is made for the tower's own)")
        places = [edit.place] if tower.side == "text" else [edit.place, replace(edit.place, at=length)]
        try:
            results = [_run(tower, inputs, replace(edit, place=place)) for place in places]
        except TROUBLE as error:
            cause = fixing(tower, length, edit.place.prefix) or f"its forward stops: {first_line(error)}"
            raise self.nothing(tower, f"{room} ({cause})") from error
        if results[0].is_meta or (results[0] - results[-1]).abs().max() <= SAME * results[0].abs().max():
            return
        raise self.nothing(tower, f"{room} (where they stand changes what becomes of the others)")


def _run(tower: Tower, inputs: Inputs, edit: Insert) -> Tensor:
    with fixed_seed():
        edit.carry_out(tower.body)
    try:
        return watch(tower, inputs)[0].features
    finally:
        edit.undo(tower.body)
