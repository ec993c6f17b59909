"""Options of a tower spec: fewer layers, another pooling, another size."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor

from lilt.towers import ImageContract, Tokens, Tower, build_tower
from lilt.towers.base import pool_tokens
from tests.towers.families import CAPTIONS, SIDES, TEXT, batch, tiny, tokens

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_layers_of_a_timm_model_are_its_first_blocks(tiny_vision: str) -> None:
    tower = build_tower(f"{tiny_vision}?layers=1", "vision").eval()
    body = build_tower(tiny_vision, "vision").eval().body
    hidden = body.blocks[0](body.norm_pre(body._pos_embed(body.patch_embed(IMAGES))))
    same(tower(IMAGES), body.norm(hidden)[:, 0])
    assert len(tower.blocks) == 1
    assert sum(p.numel() for p in tower.parameters()) < sum(p.numel() for p in body.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_first_layers_of_a_transformers_model_give_its_hidden_state(layers: int, bert: str, hf_vit: str) -> None:
    text = build_tower(f"{bert}?layers={layers}", "text").eval()
    model = hf.AutoModel.from_pretrained(bert.removeprefix("hf:"), dtype=torch.float32).eval()
    inputs = batch(text)
    same(text(inputs), model(**inputs, output_hidden_states=True).hidden_states[layers][:, 0])
    vision = build_tower(f"{hf_vit}?layers={layers}", "vision").eval()
    model = hf.AutoModel.from_pretrained(hf_vit.removeprefix("hf:")).eval()
    hidden = model(IMAGES, output_hidden_states=True).hidden_states[layers]
    same(vision(IMAGES), model.layernorm(hidden)[:, 0])


@pytest.mark.parametrize("side", ["vision", "text"])
def test_the_first_layers_of_an_open_clip_model_are_its_first_blocks(open_clip_folder: str, side: str) -> None:
    tower = build_tower(f"{open_clip_folder}?layers=1", side).eval()
    whole = build_tower(open_clip_folder, side).eval()
    whole.body.transformer.resblocks[1] = torch.nn.Identity()
    whole.body.transformer.resblocks[1].forward = lambda x, *_, **__: x
    same(tower(batch(tower)), whole(batch(whole)))


def test_a_hierarchical_model_is_cut_in_its_last_stage_only() -> None:
    spec = "timm:test_convnext?pretrained=false"  # stages of 1, 2, 4 and 2 blocks
    tower = build_tower(f"{spec}&layers=8", "vision").eval()
    assert len(tower.blocks) == 8
    whole = build_tower(spec, "vision").eval().body
    whole.stages[3].blocks[1] = torch.nn.Identity()
    same(tower(batch(tower)), whole(batch(tower)))
    with pytest.raises(ValueError, match=r"layers=7: .* has stages of \[1, 2, 4, 2\] blocks, .* give 8 to 9"):
        build_tower(f"{spec}&layers=7", "vision")


@pytest.mark.parametrize("pool", ["own", "cls", "mean", "cls+mean", "token"])
def test_pooling_reads_the_tokens_as_its_name_says(pool: str, tiny_vision: str) -> None:
    tower = build_tower(f"{tiny_vision}?pool={pool}", "vision").eval()
    hidden = tower.body.forward_features(IMAGES)
    mean = hidden[:, 1:].mean(1)
    expected = {"mean": mean, "cls+mean": torch.cat([hidden[:, 0], mean], 1)}.get(pool, hidden[:, 0])
    same(tower(IMAGES), expected)
    assert tower.dim == expected.shape[1]


def test_registers_stay_out_of_the_mean() -> None:
    tower = tiny("dinov2")
    assert tower.tokens(IMAGES).prefix == 5
    tower.pool = "mean"
    same(tower(IMAGES), tower.body.forward_features(IMAGES)[:, 5:].mean(1))


@pytest.mark.parametrize("family", ["resnet", "convnext", "swin"])
def test_maps_of_features_are_averaged_over_their_places(family: str) -> None:
    tower = tiny(family)
    tower.pool = "mean"
    raw = tower.body.forward_features(batch(tower))
    same(tower(batch(tower)), raw.mean((1, 2)) if family == "swin" else raw.mean((2, 3)))


def test_attention_pooling_is_kept_by_own_and_left_out_by_the_others() -> None:
    spec = "timm:vit_base_patch16_siglip_224?pretrained=false&image_px=32&patch_size=8&embed_dim=32&depth=1&num_heads=2"
    own, mean = (build_tower(spec + more, "vision") for more in ("", "&pool=mean"))
    assert any("attn_pool" in name for name, _ in own.named_parameters())
    assert not any("attn_pool" in name for name, _ in mean.named_parameters())


def test_every_pool_of_the_open_clip_text_side_reads_normalised_tokens(open_clip_folder: str) -> None:
    tower = build_tower(f"{open_clip_folder}?pool=token", "text").eval()
    whole = build_tower(open_clip_folder, "text").eval()
    same(tower(batch(tower)) @ whole.body.text_projection, whole(batch(whole)))
    assert "text_projection" not in dict(tower.body.named_parameters())
    vision = build_tower(f"{open_clip_folder}?pool=cls", "vision").eval()
    same(
        vision(IMAGES) @ build_tower(open_clip_folder, "vision").body.proj,
        build_tower(open_clip_folder, "vision")(IMAGES),
    )


def test_pooling_by_hand() -> None:
    features, mask = torch.arange(12.0).view(1, 4, 3), torch.tensor([[True, True, True, False]])
    text, image = Tokens(features, mask), Tokens(features, None, 1)
    assert pool_tokens(text, "cls").tolist() == [[0, 1, 2]]
    assert pool_tokens(text, "token").tolist() == [[6, 7, 8]]
    assert pool_tokens(text, "mean").tolist() == [[3, 4, 5]]
    assert pool_tokens(image, "mean").tolist() == [[6, 7, 8]]
    assert pool_tokens(image, "cls+mean").tolist() == [[0, 1, 2, 6, 7, 8]]
    assert pool_tokens(Tokens(features), "token").tolist() == [[9, 10, 11]]


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean", "token"])
def test_a_caption_means_the_same_alone_and_in_a_padded_batch(family: str, pool: str) -> None:
    tower = tiny(family)
    if family == "open_clip_text":
        tower.body.text_projection = None
    tower.pool = pool
    with torch.no_grad():
        same(tower(batch(tower)), torch.cat([tower(tokens(tower, caption)) for caption in CAPTIONS]))


def test_own_means_what_the_model_declares(bert: str) -> None:
    assert build_tower(f"{bert}?pool=own", "text").pool == "cls"
    assert {family: tiny(family).pool for family in ("bert", "t5", "gpt2", "llama", "open_clip_text")} == {
        "bert": "cls", "t5": "mean", "gpt2": "token", "llama": "token", "open_clip_text": "own",
    }  # fmt: skip


def px(tower: Tower) -> int:
    assert isinstance(tower.contract, ImageContract)
    return tower.contract.image_px


def test_another_size_resamples_the_position_embeddings(tiny_vision: str, hf_vit: str) -> None:
    larger = build_tower(tiny_vision, "vision", image_px=64).eval()
    model = timm.create_model(f"local-dir:{tiny_vision.removeprefix('timm:')}", True, num_classes=0, img_size=64)
    assert px(larger) == 64 and larger.body.pos_embed.shape == (1, 65, 32)
    same(larger(batch(larger)), model.eval()(batch(larger)))
    wide = build_tower(f"{hf_vit}?image_px=48", "vision").eval()
    model = hf.AutoModel.from_pretrained(hf_vit.removeprefix("hf:")).eval()
    same(wide(batch(wide)), model(batch(wide), interpolate_pos_encoding=True).last_hidden_state[:, 0])
    assert px(wide) == 48 and px(build_tower(f"{hf_vit}?image_px=48", "vision", image_px=64)) == 48


def test_a_convolutional_net_takes_any_size_and_an_open_clip_model_is_resampled(open_clip_folder: str) -> None:
    assert px(build_tower("timm:test_resnet?pretrained=false", "vision", image_px=96)) == 96
    tower = build_tower(f"{open_clip_folder}?image_px=64", "vision")
    assert px(tower) == 64 and tower(batch(tower)).shape == (3, 24)


@pytest.mark.parametrize("family", [f for f in SIDES if f not in ("own_mlp",)])
def test_the_tokens_are_as_wide_as_the_blocks_say(family: str) -> None:
    tower = tiny(family)
    if family.startswith("open_clip"):
        tower.pool = "mean"  # `own` gives the pooled vector only
        setattr(tower.body, "proj" if SIDES[family] == "vision" else "text_projection", None)
    found = tower.tokens(batch(tower))
    assert found.features.ndim == 3 and len(found.features) == 3
    assert found.features.shape[2] == (tower.anatomy.token_width or found.features.shape[2])
    assert (found.mask is not None) == (SIDES[family] == "text")
