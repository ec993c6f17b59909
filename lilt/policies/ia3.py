"""Learned rescaling of keys, values and what each MLP's output layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from lilt.policies.base import ALL, Blocks, Plan, Policy, register
from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.policies.gain import Bias, Gain, GainInWeight, Hold, ScaleInside, ScaleOutput
from lilt.policies.select import leaves_of
from lilt.policies.weights import Matrix, matrices
from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower


@register("ia3")
@dataclass(frozen=True)
class Ia3(Policy):
    """Train one factor for each key, each value and each activation that an MLP's output layer reads.

    y -> l * y on the output of the key and value maps, their bias included, and x -> l * x on the input of the MLP's
    last layer; l starts at one. Where a weight is read functionally its rows and the bias, wherever it stands, are
    multiplied instead.
    Count: d_k + d_v + d_mlp per block.
    Source: Liu et al. 2022, arXiv 2205.05638.
    """

    blocks: Blocks = ALL
    lr: ClassVar[float] = 1e-2  # chosen on validation, benchmarks/RESULTS.md

    def plan(self, tower: Tower) -> Plan:
        leaves = leaves_of(tower, None, self.blocks)
        edits: list[Edit] = []
        for leaf in leaves:
            if isinstance(leaf.module, nn.Conv2d):
                continue  # its channels are not the last axis
            for matrix in matrices(leaf):
                if leaf.role == "attention" and matrix.part in ("k", "v", "kv", "qkv"):
                    edits += self._keys_or_values(matrix, tower)
                elif leaf.role == "mlp" and leaf.part == "out" and _has_an_inside(leaf, leaves):
                    edits.append(self._activations(matrix))
        if not edits:
            raise self.nothing(tower, "key, value or MLP maps to rescale")
        _check_that_attention_is_known(leaves, tower)
        return Plan(tuple(edits))

    def _keys_or_values(self, matrix: Matrix, tower: Tower) -> list[Edit]:
        if matrix.part == "qkv":
            matrix = matrix.slice(tower, "kv", self.name)
        path, tensor = matrix.leaf.path, matrix.tensor
        what = {"k": "keys", "v": "values", "kv": "keys and values"}[matrix.part]
        after = matrix.total - matrix.start - matrix.rows
        shape = (matrix.rows, matrix.start, after, 1 if matrix.transposed else 0)
        biases = tuple(_biases(matrix, tower))
        head = (path, matrix.rows, self.name)
        if matrix.called:
            make = partial(Gain, *shape)
            why = f"{what}: on the layer's output"
            main: Edit = ScaleOutput(*head, why, self.lr, "ia3", make, "output", tensor, biases)
        else:
            inside = partial(GainInWeight, *shape)
            why = f"{what}: in the weight, which is read functionally"
            main = ScaleInside(*head, why, self.lr, "ia3", tensor, inside, biases)
        held = [Hold(f"{bias.path}.{bias.tensor}", 0, self.name, what, self.lr) for bias in biases if bias.inside]
        return [main, *held]

    def _activations(self, matrix: Matrix) -> Edit:
        shape = (matrix.columns, 0, 0, 0 if matrix.transposed else 1)
        head = (matrix.leaf.path, matrix.columns, self.name)
        if matrix.called:
            why = "MLP activations: on the output layer's input"
            return Attach(*head, why, self.lr, "ia3", partial(Gain, *shape), "input", matrix.tensor)
        why = "MLP activations: in the weight, which is read functionally"
        return Reparametrize(*head, why, self.lr, "ia3", matrix.tensor, partial(GainInWeight, *shape))


def _biases(matrix: Matrix, tower: Tower) -> list[Bias]:
    """Find what is added to the product: the module's own bias, and k_bias and v_bias one level up (BEiT, EVA)."""
    module, path = matrix.leaf.module, matrix.leaf.path
    own, at = "bias", matrix.start
    if isinstance(module, nn.MultiheadAttention):  # one bias, also where q, k and v have a weight each
        own, at = "in_proj_bias", module.embed_dim * "qkv".index(matrix.part[0])
    found = []
    if getattr(module, own) is not None:
        found.append(Bias(path, own, 0, matrix.rows, at, inside=not matrix.called))
    parent = path.rpartition(".")[0]
    size = matrix.rows // len(matrix.part)
    for i, part in enumerate(matrix.part):
        # their k_bias is no parameter: a buffer of zeros, which stay zeros
        tensor = dict(tower.body.get_submodule(parent).named_parameters(recurse=False)).get(f"{part}_bias")
        if tensor is not None:
            found.append(Bias(parent, f"{part}_bias", i * size, (i + 1) * size, 0, inside=True))
    return found


def _has_an_inside(out: Leaf, leaves: list[Leaf]) -> bool:
    return any((leaf.role, leaf.part, leaf.block) == ("mlp", "in", out.block) for leaf in leaves)


def _check_that_attention_is_known(leaves: list[Leaf], tower: Tower) -> None:
    parts: dict[int, set[str]] = {}
    paths: dict[int, str] = {}
    for leaf in leaves:
        if leaf.role == "attention" and leaf.block is not None and matrices(leaf):
            parts.setdefault(leaf.block, set()).add(leaf.part)
            paths.setdefault(leaf.block, leaf.path)
    for block, found in parts.items():
        if not ({"k", "v"} <= found or found & {"kv", "qkv"}):
            raise ValueError(
                f"ia3: the attention around {paths[block]} of the {tower.side} tower {tower.spec!r} has no maps named "
                f"k and v, kv or qkv; expected them to rescale keys and values; use lora(targets=attention)"
            )
