"""Adapters sit where the docstring says, compared with blocks computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.policies.adapter import Bottleneck
from tests.policies.conformance import planned, tuned
from tests.towers.families import tiny

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, X)


def test_a_bottleneck_is_a_residual_mlp_that_starts_as_the_identity() -> None:
    layer = Bottleneck(32, 8)
    assert torch.equal(layer(X), X)
    torch.nn.init.normal_(layer.up.weight)
    same(layer(X), X + F.gelu(X @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias)


def test_output_on_a_pre_norm_block_is_after_the_branch_and_before_the_residual() -> None:
    tower = tuned("adapter", tiny("deit3"))
    block, plain = tower.body.blocks[0], tiny("deit3").body.blocks[0]
    attention = block.attn.proj.adapter(plain.attn(plain.norm1(X)))
    x = X + plain.ls1(attention)
    same(block(X), x + plain.ls2(block.mlp.fc2.adapter(plain.mlp(plain.norm2(x)))))


@pytest.mark.parametrize("family", ["vit", "eva02", "beit"])
def test_input_on_a_pre_norm_block_is_before_the_norm_and_beside_the_residual(family: str) -> None:
    tower = tuned("adapter(place=input)", tiny(family))
    block, plain = tower.body.blocks[0], tiny(family).body.blocks[0]
    gains = (getattr(plain, "gamma_1", None), getattr(plain, "gamma_2", None))
    g1, g2 = (1.0 if g is None else g for g in gains)
    x17 = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))  # BEiT's bias table wants 16 patches
    x = x17 + g1 * plain.attn(plain.norm1(block.norm1.adapter(x17)))
    expected = x + g2 * plain.mlp(plain.norm2(block.norm2.adapter(x)))
    torch.testing.assert_close(block(x17), expected, rtol=1e-5, atol=1e-5)


def layer_of(tower: Any) -> Any:
    return tower.body.encoder.layer[0]


def test_output_on_a_post_norm_layer_is_after_each_output_dense_and_before_the_residual() -> None:
    layer, plain = layer_of(tuned("adapter", tiny("bert"))), layer_of(tiny("bert"))
    attended = layer.attention.output.dense.adapter(plain.attention.output.dense(plain.attention.self(X)[0]))
    h = plain.attention.output.LayerNorm(attended + X)
    mixed = layer.output.dense.adapter(plain.output.dense(plain.intermediate(h)))
    found = layer(X)
    same(found if isinstance(found, Tensor) else found[0], plain.output.LayerNorm(mixed + h))


def test_input_on_a_post_norm_layer_is_what_each_branch_reads_and_not_the_residual() -> None:
    layer, plain = layer_of(tuned("adapter(place=input)", tiny("bert"))), layer_of(tiny("bert"))
    attended = plain.attention.output.dense(plain.attention.self(layer.attention.self.adapter(X))[0])
    h = plain.attention.output.LayerNorm(attended + X)
    mixed = plain.output.dense(plain.intermediate(layer.intermediate.dense.adapter(h)))
    found = layer(X)
    same(found if isinstance(found, Tensor) else found[0], plain.output.LayerNorm(mixed + h))


def test_swinv2_norms_after_its_branches_so_the_input_is_that_of_the_attention() -> None:
    paths = [edit.path for edit in planned("adapter(place=input)", tiny("swinv2")).edits]
    assert paths[:2] == ["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("family", "per_block"),
    [("vit", 2), ("swin", 2), ("convnext", 1), ("own_vision", 2), ("open_clip_vision", 2), ("t5", 2), ("gpt2", 2)],
)
@pytest.mark.parametrize("place", ["output", "input"])
def test_every_branch_of_every_block_gets_one(family: str, per_block: int, place: str) -> None:
    tower = tiny(family)
    joint = planned(f"adapter(place={place})", tower)
    assert len(joint.edits) == per_block * len(tower.blocks)


@pytest.mark.parametrize(("reduction", "hidden"), [(1, 32), (4, 8), (5, 6), (64, 1)])
def test_the_bottleneck_is_the_width_divided_by_the_reduction_and_at_least_one(reduction: int, hidden: int) -> None:
    joint = planned(f"adapter({reduction})", tiny("vit"))
    assert {edit.count for edit in joint.edits} == {2 * 32 * hidden + hidden + 32}
