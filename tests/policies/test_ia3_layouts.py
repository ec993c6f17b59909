"""IA3 on attention and MLPs built in unusual ways: rescaled, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned
from tests.policies.factors import alive, edits_of, gains
from tests.towers.families import CONTRACT, VOCABULARY, tiny, word_tokenizer

D = 32


class Cross(nn.Module):
    """Blocks whose keys have a width of their own, and whose MLP reads its last weight functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CrossBlock(), CrossBlock()])

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class CrossBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(3, 8))
        self.attend = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)
        nn.init.normal_(self.attend.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x @ self.into, x, x)[0]
        hidden = F.linear(y, self.fc1.weight, self.fc1.bias).relu()
        return x + F.linear(hidden, self.fc2.weight, self.fc2.bias)


def test_keys_of_another_width_share_one_bias_and_an_mlp_may_be_read_functionally() -> None:
    def build() -> Tower:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_tower(Cross(), "vision", replace(CONTRACT, image_px=4)).eval()

    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    tower, dense = alive("ia3", build()), build()
    assert planned("ia3", build()).trained == 2 * (8 + 8 + 16)
    with torch.no_grad():
        expected_base = dense(images)
        for (path, tensor), child in gains(tower).items():
            module: Any = dense.body.get_submodule(path)
            at = {"k_proj_weight": 8, "v_proj_weight": 16}.get(tensor)
            getattr(module, tensor).mul_(child.l if at is None else child.l[:, None])
            if at is not None:
                module.in_proj_bias[at : at + 8] *= child.l
        assert not torch.allclose(dense(images), expected_base, atol=1e-2)
        torch.testing.assert_close(tower(images), dense(images))
        for edit in edits_of(tower):
            edit.fold(tower.body)
        torch.testing.assert_close(tower(images), dense(images))
        for name, tensor in dense.body.state_dict().items():
            torch.testing.assert_close(tower.body.state_dict()[name], tensor)


class NamelessAttention(nn.Module):
    """One head whose maps have names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.first(x) @ self.second(self.norm(x)).mT).softmax(-1) @ self.third(x)


class NamelessBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = NamelessAttention()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.fc2(self.fc1(x).relu())


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([NamelessBlock(), NamelessBlock()])

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def decoder(family: str) -> Tower:
    config = hf.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return build_tower(hf.AutoModel.from_config(config), "text", word_tokenizer())


def test_attention_whose_keys_and_values_cannot_be_told_is_refused() -> None:
    tower = build_tower(Nameless(), "vision", replace(CONTRACT, image_px=4))
    message = (
        r"the attention around blocks\.0\.attend\.first .* has no maps named k and v, kv or qkv; .*lora\(targets=attent"
    )
    with pytest.raises(ValueError, match=message):
        planned("ia3", tower)
    assert planned("lora(targets=attention)", tower).trained
    with pytest.raises(ValueError, match=r"not a third each in this order; use lora\(targets=qkv\)"):
        planned("ia3", decoder("gpt_neox"))


def test_a_tower_without_any_such_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no key, value or MLP maps to rescale; it has 4 blocks with .*conv"):
        planned("ia3", tiny("resnet"))
