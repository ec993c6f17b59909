"""Low-rank updates, beside a layer whose forward is called and inside a weight that is read functionally."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.policies.low_rank import Branch, DoraBranch, DoraInWeight, InWeight
from lilt.policies.select import leaves_of
from lilt.policies.weights import Matrix, matrices
from lilt.registry import nearest
from lilt.towers.base import Tower

TARGETS = ("q", "k", "v", "qkv", "out", "attention", "mlp", "conv", "all", "embed")


@register("lora")
@dataclass(frozen=True)
class Lora(Policy):
    """Train low-rank updates of the targeted weights; fused qkv as one weight has one A, separate q, k, v one each.

    A fused kv has one A as well.
    targets, joined by `|`: q, k, v, qkv, out or attention; mlp; conv; all of these; embed, which `all` leaves out as
    it lies outside the blocks: the convolutions that make patches (or a stem). A convolution is the matrix
    (D_out, D_in * kh * kw). Those in groups are left out: a depthwise filter has too few values per channel to factor.
    Rank per role and depth by composition, one policy a weight: `lora(r=8)+lora(r=32,targets=mlp,blocks=last:4)`; per
    tower by vision_policy and text_policy.
    dora: train the norm of each weight row apart from its direction. A rescaled DoRA still lies on the straight line
    from the pretrained weight to the tuned one, as plain LoRA does.
    Count: r * (D_in + D_out) per targeted weight; with dora D_out more.
    Source: Hu et al. 2022, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353 (dora).
    """

    r: int = 8
    alpha: float = 16.0
    targets: str = "qkv"
    blocks: Blocks = ALL
    dora: bool = False
    lr: ClassVar[float] = 3e-3  # chosen on validation, benchmarks/RESULTS.md
    size: ClassVar[str | None] = "r"

    def __post_init__(self) -> None:
        for target in self.targets.split("|"):
            if target not in TARGETS:
                raise ValueError(
                    f"lora: unknown target {target!r}; join with |: {', '.join(TARGETS)}.{nearest(target, TARGETS)}"
                )
        if self.r < 1:
            raise ValueError(f"lora: r={self.r}; expected a rank of at least 1; give a positive whole number")

    def plan(self, tower: Tower) -> Plan:
        leaves = leaves_of(tower, None, self.blocks)
        edits = [
            self._edit(chosen) for leaf in leaves for matrix in matrices(leaf) for chosen in self._choose(matrix, tower)
        ]
        if not edits:
            groups = any(isinstance(leaf.module, nn.Conv2d) and leaf.module.groups > 1 for leaf in leaves)
            reason = " (convolutions in groups are left out)" if groups else ""
            raise self.nothing(tower, f"weights for targets={self.targets}{reason}")
        return Plan(tuple(edits))

    def _choose(self, matrix: Matrix, tower: Tower) -> list[Matrix]:
        """Return the whole matrix, those of its slices that are wanted, or nothing."""
        wanted, role = set(self.targets.split("|")), matrix.leaf.role
        if role in ("mlp", "conv"):
            return [matrix] if wanted & {role, "all"} else []
        if role == "embedding":
            return [matrix] if "embed" in wanted else []
        if role != "attention":
            return []
        if wanted & {"attention", "all", matrix.part} or (matrix.part in ("q", "k", "v", "kv") and "qkv" in wanted):
            return [matrix]
        pieces = [part for part in ("q", "k", "v") if part in wanted and part in matrix.part]
        return [matrix.slice(tower, piece, f"lora(targets={self.targets})") for piece in pieces]

    def _edit(self, matrix: Matrix) -> Edit:
        count = self.r * (matrix.columns + matrix.rows) + (matrix.rows if self.dora else 0)
        name = f"lora_{matrix.part}" if matrix.rows < matrix.total else "lora"
        size = (matrix, self.r, self.alpha / self.r)
        path, tensor = matrix.leaf.path, matrix.tensor
        if matrix.called:
            beside = partial(DoraBranch if self.dora else Branch, *size)
            why = "side branch: its forward is called"
            return Attach(path, count, self.name, why, self.lr, name, beside, "output", tensor)
        inside = partial(DoraInWeight if self.dora else InWeight, *size)
        read = (
            "read functionally" if matrix.leaf.order is None or tensor != "weight" else "its layer is no plain product"
        )
        return Reparametrize(path, count, self.name, f"weight parametrization: {read}", self.lr, name, tensor, inside)
