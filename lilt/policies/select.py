"""Policies that open parameters a tower already has, chosen by role and depth."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.registry import nearest
from lilt.towers.anatomy import ROLES, Leaf
from lilt.towers.base import Tower

LAST_TWO = Blocks("last:2")
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
    lr: ClassVar[float] = 3e-4  # chosen on validation, benchmarks/RESULTS.md

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, leaves_of(tower, "attention", self.blocks), "attention")


@register("mlp")
@dataclass(frozen=True)
class Mlp(Policy):
    """Train the weights and biases of the MLPs."""

    blocks: Blocks = ALL
    lr: ClassVar[float] = 3e-4  # as for attention and the last blocks

    def plan(self, tower: Tower) -> Plan:
        return self.open(tower, leaves_of(tower, "mlp", self.blocks), "mlp")


@register("blocks")
@dataclass(frozen=True)
class WholeBlocks(Policy):
    """Train every parameter of the chosen blocks."""

    blocks: Blocks = LAST_TWO
    lr: ClassVar[float] = 3e-4  # as for attention and the last blocks

    def plan(self, tower: Tower) -> Plan:
        chosen = self.blocks.of(len(tower.anatomy.blocks))
        return self.open(tower, [leaf for leaf in tower.anatomy.leaves if leaf.block in chosen], "blocks")


@register("first")
@dataclass(frozen=True)
class First(Policy):
    """Train the first n blocks and everything before them."""

    n: int = 2
    lr: ClassVar[float] = 3e-4  # as for attention and the last blocks
    size: ClassVar[str | None] = "n"

    def plan(self, tower: Tower) -> Plan:
        chosen = _slice(self, tower, f"first:{self.n}")
        # embeddings, and what runs before the last chosen block and belongs to none
        end = max(leaf.order for leaf in tower.anatomy.leaves if leaf.block in chosen and leaf.order is not None)
        before = _with_loose(tower, chosen, lambda when: when < end)
        return self.open(tower, before, "blocks")


@register("last")
@dataclass(frozen=True)
class Last(Policy):
    """Train the last n blocks and everything after them."""

    n: int = 2
    lr: ClassVar[float] = 3e-4  # chosen on validation, benchmarks/RESULTS.md
    size: ClassVar[str | None] = "n"

    def plan(self, tower: Tower) -> Plan:
        chosen = _slice(self, tower, f"last:{self.n}")
        # what runs after the first chosen block and belongs to none: final norm, attention pooling
        start = min(leaf.order for leaf in tower.anatomy.leaves if leaf.block in chosen and leaf.order is not None)
        after = _with_loose(tower, chosen, lambda when: when > start)
        return self.open(tower, after, "blocks")


@register("except")
@dataclass(frozen=True)
class Except(Policy):
    """Train everything but the named roles, where blocks are given only in them (`except(all,blocks=first:6)`).

    roles: norm, attention, mlp, conv, embedding, other, joined by `|`, or all.
    """

    roles: str = "embedding"
    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        known = (*ROLES, "all")
        for role in self.roles.split("|"):
            if role not in known:
                raise ValueError(
                    f"except: unknown role {role!r}; join with |: {', '.join(known)}.{nearest(role, known)}"
                )

    def plan(self, tower: Tower) -> Plan:
        roles = set(ROLES if self.roles == "all" else self.roles.split("|"))
        spared = {leaf.path for leaf in leaves_of(tower, None, self.blocks) if leaf.role in roles}
        rest = [leaf for leaf in tower.anatomy.leaves if leaf.path not in spared]
        return self.open(tower, rest, f"parameters besides {self.roles} in blocks {self.blocks.text}")


@register("random")
@dataclass(frozen=True)
class Random(Policy):
    """Train tensors drawn at random up to a share of the tower's values, the same on every rank and at every load.

    The control for every rule that says where to tune.
    """

    share: float = 0.01
    seed: int = 0
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"random: share={self.share}; expected a part of the tower's values; give 0 < share <= 1")

    def plan(self, tower: Tower) -> Plan:
        everything = self.open(tower, tower.anatomy.leaves, "parameters").edits
        left = int(self.share * sum(edit.count for edit in everything))
        chosen = set()
        # its own generator: the order depends on seed and names alone
        for edit in random.Random(self.seed).sample(everything, len(everything)):
            if edit.count <= left:
                left -= edit.count
                chosen.add(edit.path)
        if not chosen:
            raise self.nothing(tower, f"tensor within a share of {self.share}")
        return Plan(tuple(edit for edit in everything if edit.path in chosen))


def _slice(policy: First | Last, tower: Tower, text: str) -> range:
    depth = len(tower.anatomy.blocks)
    if depth == 0:
        raise policy.nothing(tower, "blocks")
    if not 1 <= policy.n <= depth:
        raise ValueError(
            f"{policy.name}({policy.n}): the {tower.side} tower {tower.spec!r} has {depth} blocks; give 1 to {depth}"
        )
    return Blocks(text).of(depth)


def _with_loose(tower: Tower, chosen: range, wanted: Callable[[float], bool]) -> list[Leaf]:
    """Return the leaves of the chosen blocks, and those outside all blocks that run when it is wanted."""
    return [
        leaf for leaf in tower.anatomy.leaves if leaf.block in chosen or (leaf.block is None and wanted(_when(leaf)))
    ]


def _when(leaf: Leaf) -> float:
    """Place a leaf in the call order; what is read without a call is an embedding in front or part of a pooling."""
    if leaf.order is not None:
        return leaf.order
    return -math.inf if leaf.role == "embedding" else math.inf
