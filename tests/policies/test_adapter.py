"""Adapters sit where the docstring says, compared with blocks computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.policies import parse_policy, policies
from lilt.policies.adapter import Adapter, Beside, Bottleneck
from tests.policies.conformance import planned, run_backward, trained, tuned
from tests.towers.families import batch, tiny

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


@pytest.mark.parametrize(("reduction", "hidden"), [(1, 32), (4, 8), (5, 6), (64, 1)])
def test_the_bottleneck_is_the_width_divided_by_the_reduction_and_at_least_one(reduction: int, hidden: int) -> None:
    joint = planned(f"adapter({reduction})", tiny("vit"))
    assert {edit.count for edit in joint.edits} == {2 * 32 * hidden + hidden + 32}


def bottleneck(layer: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    """What an adapter adds, by the formula."""
    return scale * (F.gelu(x @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias)


@pytest.mark.parametrize(("options", "scale"), [("", 1.0), (",scale=4", 4.0)])
def test_parallel_on_a_pre_norm_block_reads_what_the_branch_reads(options: str, scale: float) -> None:
    tower = tuned(f"adapter(place=parallel{options})", tiny("deit3"))
    block, plain = tower.body.blocks[0], tiny("deit3").body.blocks[0]
    read = plain.norm1(X)
    x = X + plain.ls1(plain.attn(read) + bottleneck(block.attn.proj.adapter, read, scale))
    read = plain.norm2(x)
    same(block(X), x + plain.ls2(plain.mlp(read) + bottleneck(block.mlp.fc2.adapter, read, scale)))


def test_parallel_beside_a_fused_attention_and_a_gated_mlp() -> None:
    tower = tuned("adapter(place=parallel)", tiny("eva02"))
    block, plain = tower.body.blocks[0], tiny("eva02").body.blocks[0]
    read = plain.norm1(X)
    x = X + plain.attn(read) + bottleneck(block.attn.proj.adapter, read)
    read = plain.norm2(x)
    same(block(X), x + plain.mlp(read) + bottleneck(block.mlp.fc2.adapter, read))


def test_parallel_on_a_post_norm_layer_adds_before_the_residual() -> None:
    layer, plain = layer_of(tuned("adapter(place=parallel)", tiny("bert"))), layer_of(tiny("bert"))
    attended = plain.attention.output.dense(plain.attention.self(X)[0])
    h = plain.attention.output.LayerNorm(attended + bottleneck(layer.attention.output.dense.adapter, X) + X)
    mixed = plain.output.dense(plain.intermediate(h)) + bottleneck(layer.output.dense.adapter, h)
    found = layer(X)
    same(found if isinstance(found, Tensor) else found[0], plain.output.LayerNorm(mixed + h))


def test_parallel_beside_the_attention_of_torch() -> None:
    layer, plain = (
        tuned("adapter(place=parallel)", tiny("own_vision")).body.layers[0],
        tiny("own_vision").body.layers[0],
    )
    attended = plain.self_attn(X, X, X)[0] + bottleneck(layer.self_attn.adapter, X)
    h = plain.norm1(X + attended)
    same(layer(X), plain.norm2(h + plain.linear2(F.relu(plain.linear1(h))) + bottleneck(layer.linear2.adapter, h)))


@pytest.mark.parametrize("family", ["vit", "bert", "own_text"])
def test_parallel_keeps_nothing_after_a_call_and_is_switched_off_as_one(family: str) -> None:
    tower, base = tuned("adapter(place=parallel)", tiny(family)), tuned("frozen", tiny(family))
    inputs = batch(tower)
    run_backward(tower)
    twin = copy.deepcopy(tower, {id(tower.contract): tower.contract})  # fails where a graph is still held
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            assert torch.equal(twin(inputs), tower(inputs))
            assert not torch.allclose(tower(inputs), base(inputs))
            for edit in set((tower.fates or {}).values()):
                edit.switch(tower.body, on=False)
            assert torch.equal(tower(inputs), base(inputs))
            assert {module.read for module in tower.modules() if isinstance(module, Beside)} == {None}
            for edit in set((tower.fates or {}).values()):
                edit.switch(tower.body, on=True)
            assert torch.equal(tower(inputs), twin(inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_one_adapter_after_the_mlp_is_before_the_residual() -> None:
    tower = tuned("adapter(branches=mlp)", tiny("vit"))
    block, plain = tower.body.blocks[0], tiny("vit").body.blocks[0]
    x = X + plain.attn(plain.norm1(X))
    mixed = plain.mlp(plain.norm2(x))
    same(block(X), x + mixed + bottleneck(block.mlp.fc2.adapter, mixed))


@pytest.mark.parametrize("place", ["output", "input", "parallel"])
def test_a_width_counts_instead_of_the_reduction(place: str) -> None:
    joint = planned(f"adapter(reduction=2,width=5,place={place})", tiny("vit"))
    assert {edit.count for edit in joint.edits} == {2 * 32 * 5 + 5 + 32}
    assert Adapter.size == "width"


@pytest.mark.parametrize("place", ["output", "input", "parallel"])
def test_the_first_weights_of_the_paper_do_not_start_at_the_identity(place: str) -> None:
    (policy,) = parse_policy(f"adapter(width=64,place={place},init=lilt)", "vision")
    assert not policy.identity_at_start
    assert policies["adapter"].identity_at_start and parse_policy("adapter", "vision")[0].identity_at_start
    tower, base = tuned(f"adapter(width=64,place={place},init=lilt)", tiny("vit"), alive=False), tiny("vit")
    with torch.no_grad():
        assert not torch.allclose(tower(batch(tower)), base(batch(base)), rtol=0, atol=1e-5)
    for name, tensor in trained(tower).items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.018 < tensor.std() < 0.022


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("width=0", "width=0; expected at least 1 hidden unit; give 64"),
        ("reduction=0", "reduction=0; expected at least 1"),
        ("place=inputs", r"unknown place 'inputs'; known: output, input, parallel\. Did you mean 'input'\?"),
        ("branches=mpl", r"unknown branches 'mpl'; known: both, mlp, attention\. Did you mean 'mlp'\?"),
        ("init=zero", "unknown init 'zero'; known: identity, lilt"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(f"adapter({options})", "vision")


def test_scaled_back_to_nothing_it_is_the_base() -> None:
    tower, base = tuned("adapter(place=parallel,init=lilt)", tiny("bert")), tuned("frozen", tiny("bert"))
    for edit in set((tower.fates or {}).values()):
        edit.rescale(tower.body, 0.0)
    with torch.no_grad():
        assert torch.equal(tower(batch(tower)), base(batch(base)))
