"""The new layer on top: what it computes, where it stands, which tokens it sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilt.policies.attach import attention_mask
from lilt.policies.deep_adapter import TopLayer
from tests.policies.conformance import planned, tuned
from tests.towers.families import batch, tiny


def alive(layer: TopLayer) -> TopLayer:
    for tensor in layer.parameters():
        nn.init.normal_(tensor, std=0.2)
    return layer


def torch_layer(layer: TopLayer, width: int) -> nn.TransformerEncoderLayer:
    """The same layer out of torch's own parts, as a witness."""
    other = nn.TransformerEncoderLayer(
        width, layer.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "norm1.": "norm1.", "norm2.": "norm2.",
        "linear1.": "fc1.", "linear2.": "fc2.",
    }  # fmt: skip
    state = layer.state_dict()
    other.load_state_dict({a + k: state[b + k] for a, b in names.items() for k in ("weight", "bias")})
    return other


def test_it_is_a_pre_norm_transformer_layer_and_starts_as_the_identity() -> None:
    x = torch.randn(2, 5, 32)
    layer = TopLayer(32, 2)
    assert torch.equal(layer(x), x)
    torch.testing.assert_close(alive(layer)(x), torch_layer(layer, 32)(x), rtol=1e-4, atol=1e-5)


def test_masked_tokens_are_not_read() -> None:
    x = torch.randn(2, 5, 32)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    layer = alive(TopLayer(32, 2))
    found = layer(x, keep[:, None, None, :])
    torch.testing.assert_close(found[keep], torch_layer(layer, 32)(x, src_key_padding_mask=~keep)[keep])
    torch.testing.assert_close(found[1, :3], layer(x[1:, :3])[0])


def test_it_stands_between_the_last_block_and_the_final_norm() -> None:
    tower = tuned("deep_adapter", tiny("vit"))
    plain = tiny("vit").body
    tokens = plain._pos_embed(plain.patch_embed(batch(tower)))
    top = tower.body.blocks[1].deep_adapter(plain.blocks(tokens))
    torch.testing.assert_close(tower(batch(tower)), plain.norm(top)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "width"), [("vit", 32), ("eva02_base", 32), ("t5", 32), ("own_text", 32)])
def test_it_is_as_wide_as_the_tokens(family: str, width: int) -> None:
    assert planned("deep_adapter", tiny(family)).trained == 12 * width**2 + 13 * width


@pytest.mark.parametrize("family", ["swin", "convnext", "own_mlp"])
def test_a_tower_whose_blocks_give_no_tokens_is_refused_before_anything_changes(family: str) -> None:
    with pytest.raises(ValueError, match=r"has no blocks that give tokens \(B, L, D\); it has"):
        planned("deep_adapter", tiny(family))


class Block(nn.Module):
    def forward(self, x: Tensor, mask: Any = None, position_bias: Any = None, src_key_padding_mask: Any = None) -> None:
        """Stand for a block of some library, called in its way."""


KEEP = torch.tensor([[True, True, True], [True, False, False]])
CAUSAL = torch.ones(3, 3).tril().bool()
FAR = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((KEEP[:, None, None, :],), {}),
        ((KEEP[:, None, None, :] & CAUSAL,), {}),
        ((torch.zeros(2, 1, 3, 3).masked_fill(~(KEEP[:, None, None, :] & CAUSAL), FAR),), {}),
        ((), {"attention_mask": KEEP.long()}),
        ((None, torch.randn(1, 4, 3, 3)), {"src_key_padding_mask": ~KEEP}),
        ((), {"src_mask": ~CAUSAL, "src_key_padding_mask": ~KEEP}),
    ],
)
def test_the_real_tokens_are_read_from_the_masks_of_every_library(args: tuple, kwargs: dict[str, Any]) -> None:
    found = attention_mask(Block(), (torch.randn(2, 3, 8), *args), kwargs, 3)
    assert found is not None
    kept = found > FAR if found.is_floating_point() else found
    assert torch.equal(kept, KEEP[:, None, None, :])


@pytest.mark.parametrize("causal", [~CAUSAL, torch.zeros(3, 3).masked_fill(~CAUSAL, float("-inf"))])
def test_a_causal_mask_of_torch_is_kept(causal: Tensor) -> None:
    found = attention_mask(Block(), (torch.randn(2, 3, 8),), {"attn_mask": causal}, 3)
    assert found is not None
    assert torch.equal(found == 0 if found.is_floating_point() else found, CAUSAL)


@pytest.mark.parametrize("position_bias", [None, torch.randn(1, 4, 3, 3)])
def test_no_mask_is_no_mask_and_a_position_bias_is_none(position_bias: Any) -> None:
    assert attention_mask(Block(), (torch.randn(2, 3, 8), None, position_bias), {}, 3) is None
