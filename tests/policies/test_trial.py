"""What a trial run finds out: where the tokens are, and which towers have no room for more; it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned, tuned
from tests.towers.families import CONTRACT, SMALL, OwnTransformer, Patches, batch, tiny, word_tokenizer


class TokensFirst(OwnTransformer):
    """The same tower with tokens on the first axis, as torch's layers have them by default."""

    def __init__(self, embed: nn.Module):
        super().__init__(embed)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.batch_first = False

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


@pytest.mark.parametrize("spec", ["prompt(3)", "prompt(3,deep)"])
def test_the_axis_of_the_tokens_is_found(spec: str) -> None:
    one, other = (build_tower(kind(Patches()), "vision", CONTRACT) for kind in (OwnTransformer, TokensFirst))
    other.body.load_state_dict(one.body.state_dict())
    images = batch(one)
    torch.testing.assert_close(tuned(spec, other)(images), tuned(spec, one)(images), rtol=1e-5, atol=1e-6)


def hf_beit() -> Tower:
    """A BEiT that stretches its table of positions to however many tokens there are."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    config = hf.BeitConfig(**small, image_size=32, patch_size=8, use_relative_position_bias=True)
    return build_tower(hf.BeitModel(config), "vision", hf.ViTImageProcessor(size={"height": 32, "width": 32}))


def hf_text(family: str, **options: Any) -> Tower:
    config = hf.AutoConfig.for_model(family, **SMALL, **options)
    return build_tower(hf.AutoModel.from_config(config), "text", word_tokenizer())


class Fading(nn.Module):
    """A block that weighs its tokens by how far along they are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x)) * torch.linspace(0, 1, x.shape[1])[:, None]


class FadingTower(nn.Module):
    """Somebody's own encoder made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = Patches(), nn.Sequential(Fading(), Fading())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.embed(images))


@pytest.mark.parametrize("spec", ["prompt(3)", "prompt(3,deep)"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("swin"), r"no blocks that give tokens \(B, L, D\)"),
        (lambda: tiny("resnet"), r"no blocks that give tokens \(B, L, D\)"),
        (lambda: tiny("beit"), r"blocks\.0\.attn\.relative_position_bias_table is made for the tower's own"),
        (hf_beit, r"relative_position_bias_table is made for the tower's own"),
        (lambda: build_tower(FadingTower(), "vision", CONTRACT), "where they stand changes what becomes of the others"),
        (lambda: hf_text("albert", embedding_size=32), r"run once each and on the same tokens .*\(2, 24, 32\)"),
        (lambda: hf_text("deberta-v2", relative_attention=True, pos_att_type=["c2p"]), "its forward stops: .*27.*24"),
        (lambda: hf_text("gptj", rotary_dim=8), r"embed_positions \(24, 8\) is made for 24"),
    ],
)  # fmt: skip
def test_a_tower_without_room_is_refused_and_stays_as_it_was(spec: str, make: Any, reason: str) -> None:
    tower = make().train()
    tower.body.get_submodule(next(name for name, _ in tower.body.named_children())).eval()

    def state() -> list[Any]:
        return [
            (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in tower.named_modules()
        ]

    before, weights, chance = state(), list(tower.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=reason) as error:
        planned(spec, tower)
    assert "; it has" in str(error.value)
    assert state() == before
    assert list(tower.state_dict()) == weights
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_plan_that_succeeds_leaves_no_trace_either() -> None:
    tower = tiny("vit")
    chance = torch.get_rng_state()
    planned("prompt(3,deep)", tower)
    assert torch.equal(torch.get_rng_state(), chance)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tower.modules())


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_without_weights_it_can_be_planned(family: str) -> None:
    tower = tiny(family)
    tower.body.to("meta")
    assert planned("prompt(3,deep)", tower).trained == 2 * 3 * 32


def test_without_weights_a_fixed_table_is_refused() -> None:
    tower = tiny("beit")
    tower.body.to("meta")
    with pytest.raises(ValueError, match="no room for 8 more tokens"):
        planned("prompt", tower)
