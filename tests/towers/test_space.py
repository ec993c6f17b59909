"""Which of its tokens a tower pools by is found by running it, over all libraries, and what is none is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lilt.towers import build_tower
from lilt.towers.base import Tokens, pool_tokens
from lilt.towers.space import Space, find_space
from tests.towers.families import VISION, batch, tiny
from tests.towers.joint_models import VISION as SIZES
from tests.towers.joint_models import shaken

FOUND = {
    "vit": "cls", "deit3": "cls", "dinov2": "cls", "hf_vit": "cls",
    "dinov3": "mean", "swin": "mean", "swinv2": "mean", "resnet": "mean", "own_vision": "mean",
    "bert": "cls", "roberta": "cls", "distilbert": "cls", "mpnet": "cls", "modernbert": "cls", "xlm-roberta": "cls",
    "t5": "mean", "gpt2": "token", "llama": "token", "own_text": "mean",
}  # fmt: skip
NORMED = {"eva02": "mean", "eva02_base": "mean", "beit": "mean", "convnext": "mean"}
NONE = {"siglip": "in another way", "own_mlp": "no tokens", "open_clip_vision": "no tokens", "open_clip_text": "no"}


def pooled(space: Space, tokens: Tokens) -> Tensor:
    return pool_tokens(space.bring(tokens), space.how)


def test_every_family_is_told() -> None:
    assert not FOUND.keys() & NORMED.keys() & NONE.keys()
    assert VISION.keys() <= FOUND.keys() | NORMED.keys() | NONE.keys()


@pytest.mark.parametrize("family", FOUND)
def test_pooled_features_are_a_token_or_the_mean(family: str) -> None:
    tower = tiny(family)
    space = find_space(tower)
    assert space == Space(FOUND[family])
    inputs = batch(tower)
    with torch.no_grad():
        torch.testing.assert_close(pooled(space, tower.tokens(inputs)), tower(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", NONE)
def test_what_is_pooled_otherwise_is_refused(family: str) -> None:
    tower = tiny(family)
    message = rf"the {tower.side} tower '.*' (gives|pools) .*{NONE[family]}.*; expected a tower that pools by one token"
    with pytest.raises(ValueError, match=message):
        find_space(tower)


@pytest.mark.parametrize("family", NORMED)
def test_a_norm_behind_the_mean_is_each_tokens_too(family: str) -> None:
    tower = tiny(family)
    space = find_space(tower)
    assert space.how == "mean"
    with torch.no_grad():
        raw = tower.body.forward_features(inputs := batch(tower))
        if family == "convnext":
            norm = tower.body.head.norm
            raw = raw.flatten(2).transpose(1, 2)
        else:
            norm = tower.body.fc_norm
        before = raw[:, getattr(tower.body, "num_prefix_tokens", 0) :].mean(1)

        def normed(x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

        torch.testing.assert_close(normed(before), tower(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(space.bring(tower.tokens(inputs)).features, normed(raw), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformers_clip_norms_its_class_token_alone() -> None:
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tower = build_tower(shaken(hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES))), "vision", processor).eval()
    space = find_space(tower)
    norm = next(module for name, module in tower.body.named_modules() if name.endswith("post_layernorm"))
    assert space == Space("cls", norm)
    images = batch(tower)
    hidden = tower.body(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(space.bring(tower.tokens(images)).features, norm(hidden))
    torch.testing.assert_close(pooled(space, tower.tokens(images)), tower(images))


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_a_pool_that_was_asked_for_is_taken_at_its_word(pool: str, tiny_vision: str) -> None:
    tower = build_tower(f"{tiny_vision}?pool={pool}", "vision").train()
    assert find_space(tower) == Space(pool)
    assert tower.training
    space, images = Space(pool), batch(tower.eval())
    with torch.no_grad():
        tokens = tower.tokens(images)
        brought = space.bring(tokens)
        assert brought.features.shape[-1] == tower.dim
        how = "mean" if pool == "cls+mean" else pool
        torch.testing.assert_close(pool_tokens(brought, how), tower(images))
