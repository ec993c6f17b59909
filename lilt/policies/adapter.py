"""Bottleneck adapters, two per block: on the output of each branch (Houlsby) or on its input (LilT's ViT)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies.attach import Child
from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.policies.edits import Attach, Edit
from lilt.registry import nearest
from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower

PLACES = ("output", "input")


class Bottleneck(Child):
    """h -> h + up(GELU(down(h))); up starts at zero, so that step 0 is the pretrained tower."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *tensors: Tensor) -> Tensor:
        hidden = tensors[-1]  # the input alone, or (input, output) of a hooked module
        return hidden + self.up(F.gelu(self.down(hidden)))

    def rescale(self, factor: float) -> None:
        self.up.weight.data.mul_(factor)
        self.up.bias.data.mul_(factor)


@register("adapter")
@dataclass(frozen=True)
class Adapter(Policy):
    """Train a bottleneck of width d / reduction in each branch of each block; the tower itself stays.

    place=output: after the branch's last dense layer, before the residual is added (Houlsby et al. 2019).
    place=input: before the branch's norm, beside the residual: x + attn(norm(A(x))) (Khan & Fu 2023).
    Count: 2dk + k + d per adapter, k = d / reduction.
    """

    reduction: int = 4
    place: str = "output"
    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(
                f"adapter: unknown place {self.place!r}; known: {', '.join(PLACES)}.{nearest(self.place, PLACES)}"
            )
        if self.reduction < 1:
            raise ValueError(
                f"adapter: reduction={self.reduction}; expected at least 1; the tower's width is divided by it: give 4"
            )

    def plan(self, tower: Tower) -> Plan:
        edits = []
        for block in self.blocks.of(len(tower.anatomy.blocks)):
            leaves = [leaf for leaf in tower.anatomy.leaves if leaf.block == block]
            for role in ("attention", "mlp"):
                site = (_output_site if self.place == "output" else _input_site)(tower, leaves, role)
                if site is not None:
                    edits.append(self._edit(*site))
        if not edits:
            raise self.nothing(tower, "attention or mlp branches")
        return Plan(tuple(edits))

    def _edit(self, path: str, width: int) -> Edit:
        hidden = max(1, width // self.reduction)
        count = 2 * width * hidden + hidden + width
        make = partial(Bottleneck, width, hidden)
        why = f"bottleneck {hidden} on the branch {self.place}"
        return Attach(path, count, self.name, why, self.lr, "adapter", make, self.place)


def _output_site(tower: Tower, leaves: list[Leaf], role: str) -> tuple[str, int] | None:
    out = next((leaf for leaf in leaves if leaf.role == role and leaf.part == "out"), None)
    if out is None:
        return None
    assert isinstance(out.module.weight, Tensor)
    width = out.module.weight.shape[1 if type(out.module).__name__ == "Conv1D" else 0]
    if out.order is not None:
        return out.path, width
    # nn.MultiheadAttention reads out_proj functionally: hook its own output instead
    return out.path.rpartition(".")[0], width


def _input_site(tower: Tower, leaves: list[Leaf], role: str) -> tuple[str, int] | None:
    # a block's own tensors (gains) say nothing about the order of its parts
    called = [leaf for leaf in leaves if leaf.order is not None and leaf.path not in tower.anatomy.blocks]
    called.sort(key=lambda leaf: leaf.order or 0)
    branch = [leaf for leaf in called if leaf.role == role]
    if not branch:
        return None
    first = branch[0]
    before = called[: called.index(first)]
    if called[0].role == "norm" and before[-1].role == "norm":
        norm = before[-1]  # pre-norm block: the hook on the norm leaves the residual alone
        return norm.path, int(next(norm.module.parameters(recurse=False)).shape[0])
    if role == "mlp":
        return first.path, _width_in(first.module)
    # post-norm block: the module that holds the projections takes the input, so that q, k and v all see it adapted
    source = next(leaf for leaf in leaves if leaf.role == role and leaf.part in ("q", "qkv"))
    holder = source.path if isinstance(source.module, nn.MultiheadAttention) else source.path.rpartition(".")[0]
    return holder, _width_in(source.module)


def _width_in(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    assert isinstance(module.weight, Tensor)
    return int(module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1])
