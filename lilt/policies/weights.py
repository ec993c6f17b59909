"""The weights of a leaf read as matrices: how large, what their rows are for, and whether a branch can stand beside."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from lilt.towers.anatomy import Leaf, is_dense
from lilt.towers.base import Tower


@dataclass(frozen=True)
class Matrix:
    """A weight as a matrix (total, columns), or `rows` of its rows from `start` on, which make q, k or v."""

    leaf: Leaf
    tensor: str  # its name on the module
    part: str  # q k v kv qkv out (attention), in out (mlp), or ""
    total: int
    columns: int
    start: int
    rows: int
    transposed: bool  # stored as (columns, total), as GPT-2 does

    @property
    def called(self) -> bool:
        """Whether a forward that is known to be the plain product with this weight is called."""
        module = self.leaf.module
        plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) or self.transposed
        zeros = not isinstance(module, nn.Conv2d) or module.padding_mode == "zeros"
        return self.leaf.order is not None and self.tensor == "weight" and plain and zeros

    def slice(self, tower: Tower, part: str, wanted: str) -> Matrix:
        """Return the rows of a fused qkv or kv that make q, k, v or, as kv, the last two.

        Raises ValueError if they are not known.
        """
        size = self.total // len(self.part)
        if not self._in_equal_shares(tower, size):
            held = "q, k and v" if self.part == "qkv" else "k and v"
            share = "third" if self.part == "qkv" else "half"
            raise ValueError(
                f"{wanted}: {self.leaf.path} of the {tower.side} tower {tower.spec!r} holds {held} in one weight "
                f"of {self.total} rows that are not a {share} each in this order; use lora(targets=qkv)"
            )
        return replace(self, part=part, start=size * self.part.index(part[0]), rows=size * len(part))

    def _in_equal_shares(self, tower: Tower, size: int) -> bool:
        module = self.leaf.module
        if isinstance(module, nn.MultiheadAttention):
            return True
        # GPT-NeoX, BLOOM and Falcon store q, k, v head by head under this name
        if self.leaf.path.endswith("key_value") or self.total % len(self.part):
            return False
        widths = {matrix.columns for leaf in self._outs(tower) for matrix in matrices(leaf)}
        if self.part == "qkv":  # what the output map reads is as wide as v; with fewer keys than queries q is wider
            return not widths or size in widths
        # less than a head: keys that are their own values (DeepSeek-V4)
        head = getattr(tower.body.get_submodule(self.leaf.holder), "head_dim", 1)
        # where queries share keys and values, the output map reads a multiple of a half
        return size % head == 0 and (not widths or any(width % size == 0 for width in widths))

    def _outs(self, tower: Tower) -> list[Leaf]:
        """Return what may be the output map: that of the block, and beside this weight what is none of q, k and v."""
        leaves = [leaf for leaf in tower.anatomy.leaves if leaf.role == "attention" and leaf.block == self.leaf.block]
        beside = self.leaf.holder
        return [x for x in leaves if x.part == "out" or (x.part == "" and x.holder == beside)]


def matrices(leaf: Leaf) -> list[Matrix]:
    """Return the dense weights of a leaf: of Linear, Conv1D, Conv2d without groups, and nn.MultiheadAttention."""
    module = leaf.module
    named = {"weight": leaf.part}
    if isinstance(module, nn.MultiheadAttention):
        fused = module.in_proj_weight is not None
        named = {"in_proj_weight": "qkv"} if fused else {f"{part}_proj_weight": part for part in "qkv"}
    elif not is_dense(module) and not (isinstance(module, nn.Conv2d) and module.groups == 1):
        return []
    found = []
    for tensor, part in named.items():
        weight = getattr(module, tensor)
        assert isinstance(weight, Tensor)
        total, columns = weight.flatten(1).shape
        transposed = type(module).__name__ == "Conv1D"
        if transposed:
            total, columns = columns, total
        found.append(Matrix(leaf, tensor, part, total, columns, 0, total, transposed))
    return found
