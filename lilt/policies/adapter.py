"""Bottleneck adapters in the branches of each block: on a branch's output, on its input, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies.attach import Child, attach
from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.policies.branches import input_site, output_site, read_site
from lilt.policies.edits import Attach, Edit
from lilt.registry import nearest
from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower

CHOICES = {
    "place": ("output", "input", "parallel"),
    "branches": ("both", "mlp", "attention"),
    "init": ("identity", "lilt"),
}
LILT_STD = 0.02
# what a branch needs at the ends where an adapter of that place stands
BOUNDS = {
    "output": "end in a linear layer",
    "input": "begin with a norm or linear layer over the last axis",
    "parallel": "begin and end with a linear layer",
}


class Bottleneck(Child):
    """h -> h + scale * up(GELU(down(h))); identity: up starts at zero, so that step 0 is the pretrained tower."""

    def __init__(self, width: int, hidden: int, scale: float = 1.0, identity: bool = True):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if identity:
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                nn.init.normal_(layer.weight, std=LILT_STD)
            nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def add(self, hidden: Tensor, read: Tensor) -> Tensor:
        """Return hidden plus what the bottleneck makes of read."""
        width = self.down.in_features
        if hidden.shape != read.shape or hidden.shape[-1] != width:
            seen = " and ".join(str(tuple(shape)) for shape in dict.fromkeys((hidden.shape, read.shape)))
            raise ValueError(
                f"an adapter of width {width} stands among values of shape {seen}; expected one shape with {width} "
                "channels on the last axis; choose another place or other branches or blocks, or lora"
            )
        return torch.add(hidden, self.up(F.gelu(self.down(read))), alpha=self.scale)

    def forward(self, *tensors: Tensor) -> Tensor:
        hidden = tensors[-1]  # the input alone, or (input, output) of a hooked module
        return self.add(hidden, hidden)

    def rescale(self, factor: float) -> None:
        self.up.weight.data.mul_(factor)
        self.up.bias.data.mul_(factor)


class Beside(Bottleneck):
    """y -> y + scale * up(GELU(down(x))) at the end of a branch, with the x that the branch has read."""

    read: Tensor | None = None  # from the branch's start to its end, in one run of its block

    def forward(self, *tensors: Tensor) -> Tensor:
        read, self.read = self.read, None
        assert read is not None, "the branch starts where the anatomy says"
        return self.add(tensors[-1], read)


class Tap(Child):
    """Hands what a branch reads to the adapter at its end."""

    def __init__(self, adapter: Beside):
        super().__init__()
        self.adapters = (adapter,)  # in a tuple, so that it is no child of this one too

    def forward(self, x: Tensor) -> Tensor:
        self.adapters[0].read = x
        return x


@dataclass(frozen=True)
class AttachBeside(Attach):
    """Hang an adapter at the end of a branch and a tap at its start."""

    source: str = field(kw_only=True)  # path of the module whose input is what the branch reads

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        trained = super().carry_out(body)
        adapter = self.child(body)
        assert isinstance(adapter, Beside)
        attach(body.get_submodule(self.source), f"{self.name}_tap", Tap(adapter), "input")
        return trained

    def switch(self, body: nn.Module, on: bool) -> None:
        super().switch(body, on)
        getattr(body.get_submodule(self.source), f"{self.name}_tap").off = not on


@register("adapter")
@dataclass(frozen=True)
class Adapter(Policy):
    """Train a bottleneck of width d / reduction in each branch of each block; the tower itself stays.

    width: hidden units, instead of a reduction. branches: both, mlp, attention. blocks: a slice of the depth.
    place=output: after the branch's last dense layer, before the residual is added (Houlsby et al. 2019); with
    branches=mlp one adapter a block (Pfeiffer et al. 2021, who normalise once more before it).
    place=input: before the branch's norm, beside the residual: x + attn(norm(A(x))) (Khan & Fu 2023).
    place=parallel: beside the branch: y + scale * up(GELU(down(x))), x what the branch reads (He et al. 2022, there
    with scale=4).
    init=lilt: weights of both layers from N(0, 0.02), so that step 0 is not the pretrained tower (Khan & Fu 2023).
    Count: 2dk + k + d per adapter, k = width or d / reduction.
    """

    reduction: int = 4
    place: str = "output"
    width: int | None = None
    branches: str = "both"
    init: str = "identity"
    scale: float = 1.0
    blocks: Blocks = ALL
    lr: ClassVar[float] = 3e-3  # chosen on validation, benchmarks/RESULTS.md
    mergeable: ClassVar[bool] = False
    size: ClassVar[str | None] = "width"

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            given = getattr(self, option)
            if given not in known:
                raise ValueError(
                    f"adapter: unknown {option} {given!r}; known: {', '.join(known)}.{nearest(given, known)}"
                )
        if self.reduction < 1:
            raise ValueError(
                f"adapter: reduction={self.reduction}; expected at least 1; the tower's width is divided by it: give 4"
            )
        if self.width is not None and self.width < 1:
            raise ValueError(f"adapter: width={self.width}; expected at least 1 hidden unit; give 64, or reduction=4")
        # the class declares its default and an instance what its options make of it; frozen dataclasses are set so
        object.__setattr__(self, "identity_at_start", self.init == "identity")

    def plan(self, tower: Tower) -> Plan:
        roles = ("attention", "mlp") if self.branches == "both" else (self.branches,)
        edits: list[Edit] = []
        reached, missed = set(), set()
        for block in self.blocks.of(len(tower.anatomy.blocks)):
            leaves = [leaf for leaf in tower.anatomy.leaves if leaf.block == block]
            for role in roles:
                if (edit := self._edit(tower, leaves, role)) is not None:
                    edits.append(edit)
                    reached.add(role)
                elif any(leaf.role == role for leaf in leaves):
                    missed.add(role)
        if missed - reached or not edits:
            wanted = " or ".join(missed - reached if edits else roles)
            hint = f" (branches={reached.pop()} does without)" if edits else ""
            raise self.nothing(tower, f"{wanted} branches that {BOUNDS[self.place]}{hint}")
        return Plan(tuple(edits))

    def _edit(self, tower: Tower, leaves: list[Leaf], role: str) -> Edit | None:
        site = input_site(tower, leaves, role) if self.place == "input" else output_site(tower, leaves, role)
        if site is None:
            return None
        path, width = site
        hidden = self.width or max(1, width // self.reduction)
        count = 2 * width * hidden + hidden + width
        why = f"bottleneck {hidden} on the branch {self.place}"
        if self.place != "parallel":
            make: Callable[[], Child] = partial(Bottleneck, width, hidden, self.scale, self.identity_at_start)
            return Attach(path, count, self.name, why, self.lr, "adapter", make, self.place)
        read = read_site(tower, leaves, role)
        if read is None:
            return None
        make = partial(Beside, width, hidden, self.scale, self.identity_at_start)
        return AttachBeside(path, count, self.name, why, self.lr, "adapter", make, "output", source=read[0])
