"""Policies that open parameters a tower already has, chosen by role and depth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower

# q_bias and v_bias (BEiT, EVA), in_proj_bias (nn.MultiheadAttention); not tables such as relative_position_bias_table
_BIAS = re.compile(r"^(bias|\w+_bias)$")


def leaves_of(tower: Tower, role: str | None, blocks: Blocks) -> list[Leaf]:
    """Return the leaves with a role (None: any) in a slice of blocks; those outside all blocks belong to `all`."""
    chosen = blocks.of(len(tower.anatomy.blocks))
    return [
        leaf
        for leaf in tower.anatomy.leaves
        if (role is None or leaf.role == role) and (leaf.block in chosen if leaf.block is not None else blocks == ALL)
    ]


@register("frozen")
@dataclass(frozen=True)
class Frozen(Policy):
    """Train nothing in the tower, only the heads."""

    def plan(self, tower: Tower) -> Plan:
        return Plan()


@register("full")
@dataclass(frozen=True)
class Full(Policy):
    """Train every parameter of the tower."""

    lr: ClassVar[float] = 1e-4

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, tower.anatomy.leaves, "parameters")


@register("layernorm")
@dataclass(frozen=True)
class LayerNorm(Policy):
    """Train every normalisation's weight and bias.

    Count: (2N + 1) * 2d per pre-norm tower of N blocks and width d.
    Source: Khan & Fu 2023, arXiv 2303.11866.
    """

    blocks: Blocks = ALL
    lr: ClassVar[float] = 5e-3

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, leaves_of(tower, "norm", self.blocks), "normalisation")


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Policy):
    """Train every bias.

    Source: Ben Zaken et al. 2022, arXiv 2106.10199.
    """

    blocks: Blocks = ALL
    lr: ClassVar[float] = 2e-3

    def plan(self, tower: Tower) -> Plan:
        leaves = leaves_of(tower, None, self.blocks)
        return self.open(tower, leaves, "biases", only=lambda name: bool(_BIAS.match(name)))


@register("attention")
@dataclass(frozen=True)
class Attention(Policy):
    """Train the attention weights and biases."""

    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-4

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, leaves_of(tower, "attention", self.blocks), "attention")


@register("mlp")
@dataclass(frozen=True)
class Mlp(Policy):
    """Train the weights and biases of the MLPs."""

    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-4

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, leaves_of(tower, "mlp", self.blocks), "mlp")


@register("last")
@dataclass(frozen=True)
class Last(Policy):
    """Train the last n blocks and everything after them."""

    n: int = 2
    lr: ClassVar[float] = 1e-4

    def plan(self, tower: Tower) -> Plan:
        depth = len(tower.anatomy.blocks)
        if not 1 <= self.n <= depth:
            raise ValueError(
                f"last({self.n}): the {tower.side} tower {tower.spec!r} has {depth} blocks; give 1 to {depth}"
            )
        chosen = Blocks(f"last:{self.n}").of(depth)
        first = min(leaf.order for leaf in tower.anatomy.leaves if leaf.block in chosen and leaf.order is not None)
        # what runs after the first chosen block and belongs to none: final norm, attention pooling
        after = [
            leaf
            for leaf in tower.anatomy.leaves
            if leaf.block in chosen or (leaf.block is None and leaf.order is not None and leaf.order > first)
        ]
        return self.open(tower, after, "blocks")
