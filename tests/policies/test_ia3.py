"""IA3 multiplies keys, values (biases included) and MLP activations, on every way in which libraries compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lilt.policies.edits import Attach, Reparametrize
from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned, run_backward, trained
from tests.policies.factors import alive, edits_of, gains
from tests.towers.families import batch, tiny

D = 32
CASES = [
    "vit", "deit3", "dinov2", "dinov3", "eva02", "eva02_base", "beit", "swin", "swinv2", "own_vision",
    "open_clip_vision", "open_clip_text", "hf_vit", "bert", "distilbert", "mpnet", "modernbert", "t5", "gpt2", "llama",
    "convnext", "own_mlp",
]  # fmt: skip


def multiply(dense: Tower, path: str, l: Tensor) -> None:  # noqa: E741 (the paper's letter)
    """Write the factors into one leaf of a plain tower, read off the tensors it has."""
    module: Any = dense.body.get_submodule(path)
    leaf = next(leaf for leaf in dense.anatomy.leaves if leaf.path == path)
    stored = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    weight = stored.T if isinstance(module, hf.pytorch_utils.Conv1D) else stored
    if leaf.role == "mlp":
        weight *= l
        return
    weight[-len(l) :] *= l[:, None]  # a fused weight ends in keys and values
    bias = module.in_proj_bias if isinstance(module, nn.MultiheadAttention) else module.bias
    if bias is not None:
        bias[-len(l) :] *= l
    parent: Any = dense.body.get_submodule(path.rpartition(".")[0])
    if leaf.part == "qkv" and getattr(parent, "v_bias", None) is not None:
        parent.v_bias *= l[len(l) // 2 :]


@pytest.mark.parametrize("family", CASES)
def test_the_output_is_that_of_rescaled_weights_and_biases(family: str) -> None:
    tower, dense = alive("ia3", tiny(family)), tiny(family)
    with torch.no_grad():
        for (path, _), child in gains(tower).items():
            multiply(dense, path, child.l)
        expected = dense(batch(dense))
        assert not torch.allclose(expected, tiny(family)(batch(dense)), atol=1e-3)
        torch.testing.assert_close(tower(batch(tower)), expected, rtol=2e-5, atol=2e-5)


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def attend(qkv: Tensor, factors: Tensor, heads: int = 2) -> Tensor:
    """Attention by hand with its keys and values multiplied, (B, L, D)."""
    q, k, v = qkv.chunk(3, dim=-1)
    k, v = k * factors[:D], v * factors[D:]
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    weights = (split[0] @ split[1].mT / (D // heads) ** 0.5).softmax(-1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


def test_on_a_plain_fused_qkv_it_is_attention_with_rescaled_keys_and_values() -> None:
    attn, plain = alive("ia3", tiny("vit")).body.blocks[0].attn, tiny("vit").body.blocks[0].attn
    torch.testing.assert_close(attn(X), plain.proj(attend(plain.qkv(X), attn.qkv.ia3.l)))


@pytest.mark.parametrize("apart", [False, True], ids=["bias in the product", "bias added after it"])
def test_on_eva_its_separate_value_bias_is_rescaled_too(apart: bool) -> None:
    tower, plain = tiny("eva02"), tiny("eva02").body.blocks[0].attn
    for module in tower.body.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = apart
            module.k_bias.zero_()  # as it is in every real one
    tower = build_tower(tower.body, "vision", tower.contract)
    tower = alive("ia3", tower)
    assert isinstance(edits_of(tower)[0], Attach if apart else Reparametrize)
    attn = tower.body.blocks[0].attn
    factors = next(iter(gains(tower).values())).l
    bias = torch.cat([plain.q_bias, torch.zeros(D), plain.v_bias])
    assert plain.v_bias.any()
    expected = plain.proj(attend(F.linear(X, plain.qkv.weight, bias), factors))
    torch.testing.assert_close(attn(X), expected)


def test_on_multihead_attention_the_weight_and_the_bias_are_rescaled() -> None:
    tower = alive("ia3", tiny("open_clip_vision"))
    attn = tower.body.transformer.resblocks[0].attn
    plain = tiny("open_clip_vision").body.transformer.resblocks[0].attn
    factors = gains(tower)["transformer.resblocks.0.attn", "in_proj_weight"].l
    qkv = F.linear(X, plain.in_proj_weight, plain.in_proj_bias)
    torch.testing.assert_close(attn(X, X, X)[0], plain.out_proj(attend(qkv, factors)), rtol=1e-5, atol=1e-5)


def test_it_multiplies_after_the_activation_of_the_mlp() -> None:
    mlp, plain = alive("ia3", tiny("vit")).body.blocks[0].mlp, tiny("vit").body.blocks[0].mlp
    torch.testing.assert_close(mlp(X), plain.fc2(F.gelu(plain.fc1(X)) * mlp.fc2.ia3.l))
    mlp, plain = alive("ia3", tiny("llama")).body.layers[0].mlp, tiny("llama").body.layers[0].mlp
    inner = F.silu(plain.gate_proj(X)) * plain.up_proj(X)
    torch.testing.assert_close(mlp(X), plain.down_proj(inner * mlp.down_proj.ia3.l))


@pytest.mark.parametrize(
    ("family", "per_block"),
    [
        ("vit", 2 * D + 128),
        ("bert", 2 * D + 48),
        ("gpt2", 2 * D + 48),
        ("llama", 2 * 16 + 48),
        ("own_vision", 2 * D + 48),
    ],
)
def test_it_trains_one_value_per_key_value_and_activation(family: str, per_block: int) -> None:
    assert planned("ia3", tiny(family)).trained == 2 * per_block
    assert planned("ia3(blocks=last:1)", tiny(family)).trained == per_block


def test_a_weight_or_bias_it_multiplies_has_no_other_policy() -> None:
    for spec in ("ia3+lora", "attention+ia3", "ia3+ia3"):
        for family in ("vit", "open_clip_vision", "bert"):
            with pytest.raises(ValueError, match=r"both want .*weight; a weight has one policy: leave one out"):
                planned(spec, tiny(family))
    for spec in ("ia3+bitfit", "bitfit+ia3"):
        with pytest.raises(ValueError, match=r"both want transformer\.resblocks\.0\.attn\.in_proj_bias"):
            planned(spec, tiny("open_clip_vision"))
        with pytest.raises(ValueError, match=r"both want blocks\.0\.attn\.v_bias"):
            planned(spec, tiny("beit"))
    assert planned("ia3+lora(targets=q|out)", tiny("bert")).trained


def test_a_bias_may_be_trained_below_factors_on_the_output() -> None:
    tower = alive("bitfit+ia3", tiny("vit"))
    assert {edit.rule for edit in (tower.fates or {}).values()} == {"bitfit", "ia3"}
    tower.body.blocks[0].attn.qkv.bias.data.add_(1.0)
    run_backward(tower)
    assert all(p.grad is not None for p in trained(tower).values())
    with torch.no_grad():
        expected = tower(batch(tower))
        for edit in edits_of(tower):
            edit.fold(tower.body)
        torch.testing.assert_close(tower(batch(tower)), expected, rtol=1e-4, atol=1e-4)
