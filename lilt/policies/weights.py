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
    part: str  # q k v qkv out (attention), in out (mlp), or ""
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
        """Return the rows of a fused qkv that make q, k, v or, as kv, the last two. Raises ValueError if unknown."""
        third = self.total // 3
        if not self._in_thirds(tower):
            raise ValueError(
                f"{wanted}: {self.leaf.path} of the {tower.side} tower {tower.spec!r} holds q, k and v in one weight "
                f"of {self.total} rows that are not a third each in this order; use lora(targets=qkv)"
            )
        return replace(self, part=part, start=third * "qkv".index(part[0]), rows=third * len(part))

    def _in_thirds(self, tower: Tower) -> bool:
        module = self.leaf.module
        if isinstance(module, nn.MultiheadAttention):
            return True
        # GPT-NeoX, BLOOM and Falcon store q, k, v head by head under this name
        if self.leaf.path.endswith("query_key_value"):
            return False
        # what the output map reads is as wide as v; with fewer keys than queries q is wider than a third
        outs = [x for x in tower.anatomy.leaves if (x.role, x.part, x.block) == ("attention", "out", self.leaf.block)]
        widths = {matrix.columns for leaf in outs for matrix in matrices(leaf)}
        return self.total % 3 == 0 and (not widths or self.total // 3 in widths)


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
