"""Weights in unusual places and layouts are read as what they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers as hf
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from lilt.policies import apply
from lilt.policies.low_rank import LowRank
from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned, trained
from tests.policies.updates import KINDS, alive, edits_of, update
from tests.towers.families import CONTRACT, VOCABULARY, word_tokenizer


class FourKinds(nn.Module):
    """Layers that a branch cannot stand beside: a standardised weight, mirrored borders; and keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([KindsBlock(), KindsBlock()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class KindsBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.standard = StdConv2d(3, 8, 3, padding=1)
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.strided = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.attend = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
        self.back = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.strided(self.mirror(self.standard(x)).relu())
        around = x.flatten(2).mT
        y = y + self.attend(y.flatten(2).mT, around, around)[0].mT.view_as(y)
        return x + self.back(y)


def build_kinds() -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_tower(FourKinds(), "vision", replace(CONTRACT, image_px=8)).eval()


@KINDS
def test_a_layer_that_is_no_plain_product_is_adapted_inside_its_weight(dora: str) -> None:
    spec = f"lora(r=2,targets=all,dora={dora})"
    reasons = {edit.path.rpartition(".")[2]: edit.why for edit in planned(spec, build_kinds()).edits}
    assert reasons == {
        "standard": "weight parametrization: its layer is no plain product",
        "mirror": "weight parametrization: its layer is no plain product",
        "strided": "side branch: its forward is called",
        "attend": "weight parametrization: read functionally",
        "out_proj": "weight parametrization: read functionally",
        "back": "side branch: its forward is called",
    }
    tower, dense = alive(spec, build_kinds()), build_kinds()
    tensors = {getattr(edit, "tensor", "") for edit in edits_of(tower)}
    assert {"q_proj_weight", "k_proj_weight", "v_proj_weight"} <= tensors
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for edit in edits_of(tower):
            child = edit.child(tower.body)
            assert isinstance(child, LowRank)
            update(dense, edit, child, 8.0)
        assert not torch.allclose(dense(images), build_kinds()(images), atol=1e-2)
        torch.testing.assert_close(tower(images), dense(images), rtol=1e-4, atol=1e-4)


def neox() -> Tower:
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return build_tower(hf.GPTNeoXModel(config), "text", word_tokenizer())


def phi3() -> Tower:
    config = hf.Phi3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=48, pad_token_id=1,
    )  # fmt: skip
    return build_tower(hf.Phi3Model(config), "text", word_tokenizer())


@pytest.mark.parametrize("build", [neox, phi3], ids=["head by head", "fewer keys than queries"])
def test_slices_of_a_fused_weight_in_another_layout_are_refused(build: Callable[[], Tower]) -> None:
    tower = build()
    with pytest.raises(ValueError, match=r"not a third each in this order; use lora\(targets=qkv\)"):
        planned("lora(targets=q|v)", tower)
    apply(planned("lora(targets=qkv)", tower), tower)
    assert len(trained(tower)) == 4


class Fused(nn.Module):
    """An attention of one head whose inner width is its own, as in a fused qkv of 36 rows for 8 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention()
        self.back = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(x + self.attention(x))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.mT).softmax(-1) @ v)


def test_an_inner_width_of_its_own_still_has_thirds() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Turned(), nn.Sequential(Fused(), Fused()))
    tower = build_tower(body, "vision", replace(CONTRACT, image_px=8))
    assert [edit.count for edit in planned("lora(r=1,targets=q|v,blocks=0)", tower).edits] == [8 + 12, 8 + 12]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT
