"""Low-rank updates, beside a layer whose forward is called and inside a weight that is read functionally."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies.attach import Child
from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.policies.select import leaves_of
from lilt.registry import nearest
from lilt.towers.anatomy import Leaf, is_dense
from lilt.towers.base import Tower

TARGETS = ("q", "k", "v", "qkv", "out", "attention", "mlp", "all")


class LowRank(Child):
    """The factors of one update scale * B @ A, to the rows `[start, start + rows)` of a weight (total, D_in)."""

    def __init__(
        self,
        d_in: int,
        rows: int,
        r: int,
        scale: float,
        start: int = 0,
        total: int | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        self.scale, self.transposed = scale, transposed
        self.pad = (start, (total or rows) - start - rows)
        self.a = nn.Parameter(torch.empty(r, d_in))
        self.b = nn.Parameter(torch.zeros(rows, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """Return the update of the whole weight, (total, D_in)."""
        return F.pad(self.b @ self.a * self.scale, (0, 0, *self.pad))

    def fold(self, weight: Tensor) -> Tensor:
        return weight + (self.delta().T if self.transposed else self.delta())

    def rescale(self, factor: float) -> None:
        self.b.data.mul_(factor)


class Branch(LowRank):
    """y -> y + scale * x A^T B^T, the cheap form: no full-size weight gradient."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        delta = F.linear(F.linear(x, self.a), self.b) * self.scale
        return y + (F.pad(delta, self.pad) if any(self.pad) else delta)


class InWeight(LowRank):
    """W -> W + scale * B A, for a weight that nobody's forward reads; backward forms the full dW."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.off else self.fold(weight)


@register("lora")
@dataclass(frozen=True)
class Lora(Policy):
    """Train low-rank updates of the targeted weights; fused qkv as one weight has one A, separate q, k, v one each.

    Count: r * (D_in + D_out) per targeted weight. targets: q, k, v, qkv, out, attention, mlp, all, joined by `|`.
    Source: Hu et al. 2022, arXiv 2106.09685.
    """

    r: int = 8
    alpha: float = 16.0
    targets: str = "qkv"
    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        for target in self.targets.split("|"):
            if target not in TARGETS:
                raise ValueError(
                    f"lora: unknown target {target!r}; join with |: {', '.join(TARGETS)}.{nearest(target, TARGETS)}"
                )
        if self.r < 1:
            raise ValueError(f"lora: r={self.r}; expected a rank of at least 1; give a positive whole number")

    def plan(self, tower: Tower) -> Plan:
        edits = [edit for leaf in leaves_of(tower, None, self.blocks) for edit in self._edits(leaf)]
        if not edits:
            raise self.nothing(tower, f"weights for targets={self.targets}")
        return Plan(tuple(edits))

    def _edits(self, leaf: Leaf) -> list[Edit]:
        fused = isinstance(leaf.module, nn.MultiheadAttention)
        if not (fused or is_dense(leaf.module)) or leaf.role not in ("attention", "mlp"):
            return []
        if fused and leaf.module.in_proj_weight is None:
            return []
        wanted = set(self.targets.split("|"))
        attention = leaf.role == "attention"  # an MLP has an `out` too, and `out` means the attention's
        whole = leaf.role in wanted or "all" in wanted or (attention and leaf.part in wanted)
        if whole or (leaf.part in ("q", "k", "v") and "qkv" in wanted):
            slices = [""]
        elif leaf.part == "qkv":
            slices = [s for s in ("q", "k", "v") if s in wanted]
        else:
            return []
        return [self._edit(leaf, piece) for piece in slices]

    def _edit(self, leaf: Leaf, piece: str) -> Edit:
        tensor = "in_proj_weight" if isinstance(leaf.module, nn.MultiheadAttention) else "weight"
        weight = getattr(leaf.module, tensor)
        transposed = type(leaf.module).__name__ == "Conv1D"
        total, d_in = reversed(weight.shape) if transposed else weight.shape
        rows, start = (total // 3, "qkv".index(piece) * total // 3) if piece else (total, 0)
        count = self.r * (d_in + rows)
        name = f"lora_{piece}" if piece else "lora"
        shape = (d_in, rows, self.r, self.alpha / self.r, start, total, transposed)
        if leaf.order is not None and tensor == "weight":
            why = "side branch: its forward is called"
            return Attach(leaf.path, count, self.name, why, self.lr, name, partial(Branch, *shape), "output", tensor)
        inside = partial(InWeight, *shape)
        why = "weight parametrization: read functionally"
        return Reparametrize(leaf.path, count, self.name, why, self.lr, name, tensor, inside)
