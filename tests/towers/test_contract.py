"""How each tower wants its input: its own statistics, its own tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image

from lilt.data import eval_transform
from lilt.towers import ImageContract, Tower, build_tower
from lilt.towers.tokenizer import FixedTokenizer, HfTokenizer
from tests.towers.families import CAPTIONS, VOCABULARY, batch, open_clip_arch, tiny, tokens, word_tokenizer
from tests.towers.joint_models import save_open_clip

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def contract(tower: Tower) -> ImageContract:
    assert isinstance(tower.contract, ImageContract)
    return tower.contract


@pytest.mark.parametrize(
    ("name", "statistics", "crop"),
    [("vit_tiny_patch16_224.augreg_in21k", HALF, 0.9), ("deit_tiny_patch16_224.fb_in1k", IMAGENET, 0.9)],
)
def test_a_timm_model_brings_its_own_statistics(name: str, statistics: tuple, crop: float) -> None:
    tower = build_tower(timm.create_model(name, pretrained=False, depth=1, embed_dim=32, num_heads=2), "vision")
    found = contract(tower)
    assert (found.mean, found.std) == statistics
    assert (found.image_px, found.interpolation, found.crop) == (224, "bicubic", crop)


def test_an_hf_processor_that_resizes_the_short_edge_and_crops(hf_dinov2: str) -> None:
    found = contract(build_tower(hf_dinov2, "vision"))
    assert (found.image_px, found.crop, found.interpolation) == (32, 0.8, "bicubic")
    assert (found.mean, found.std) == IMAGENET
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    processor = hf.AutoImageProcessor.from_pretrained(hf_dinov2.removeprefix("hf:"), use_fast=True)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = eval_transform(found)(picture)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < 0.02


def test_an_hf_processor_that_warps(hf_vit: str) -> None:
    found = contract(build_tower(hf_vit, "vision"))
    assert (found.image_px, found.crop, found.mean, found.std) == (32, 1.0, *HALF)


def test_convnext_has_its_own_rule_of_cropping() -> None:
    config = hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=64)
    for px, crop in ((64, 0.875), (384, 1.0)):
        processor = hf.ConvNextImageProcessor(size={"shortest_edge": px}, crop_pct=0.875)
        found = contract(build_tower(hf.ConvNextModel(config), "vision", processor))
        assert (found.image_px, found.crop) == (px, crop)


def test_an_open_clip_folder_brings_its_own_statistics(open_clip_folder: str) -> None:
    found = contract(build_tower(open_clip_folder, "vision"))
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (found.image_px, found.interpolation) == (32, "bilinear")
    plain = contract(build_tower(f"open_clip:{open_clip_arch()}?pretrained=false", "vision"))
    assert plain.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_special_tokens_and_token_types_are_the_models_own(bert: str) -> None:
    tower = build_tower(bert, "text")
    inputs = batch(tower)
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert inputs["input_ids"][:, 0].tolist() == [0, 0, 0]
    last = inputs["attention_mask"].sum(1) - 1
    assert inputs["input_ids"][torch.arange(3), last].tolist() == [2, 2, 2]


def test_padding_is_the_models_own(roberta: str) -> None:
    inputs = batch(build_tower(roberta, "text"))
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 1).all()
    assert (inputs["attention_mask"] == 0).any()


def test_a_tokenizer_without_padding_pads_behind_the_mask() -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tower = build_tower(tiny("gpt2").body, "text", tokenizer).eval()
    inputs = batch(tower)
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 2).all()
    torch.testing.assert_close(tower(inputs)[:1], tower(tokens(tower, CAPTIONS[0])), rtol=0, atol=1e-5)


def test_roberta_reads_two_positions_less_than_its_table_has(roberta: str) -> None:
    tower = build_tower(roberta, "text").eval()
    tokenizer = tower.contract
    assert isinstance(tokenizer, HfTokenizer) and tokenizer.context_tokens == 512
    encodings, cut = tokenizer.encode(["a " * 600])
    assert (len(encodings[0]["input_ids"]), cut) == (512, 1)
    assert tower(tokenizer.pad(encodings)).isfinite().all()


@pytest.mark.parametrize(("limit", "expected"), [(None, 0), (10, 0), (9, 1), (8, 1), (7, 2), (5, 2), (4, 3)])
def test_cut_captions_are_counted_exactly(limit: int | None, expected: int) -> None:
    tokenizer = tiny("bert").contract
    assert isinstance(tokenizer, HfTokenizer)
    encodings, cut = tokenizer.encode(CAPTIONS, limit)  # of 5, 10 and 8 tokens with their frame
    assert cut == expected
    assert all(e["input_ids"][-1] == 2 for e in encodings)
    assert max(len(e["input_ids"]) for e in encodings) <= (limit or 10)


@pytest.mark.parametrize(("words", "limit", "cut"), [(14, None, 0), (15, None, 1), (13, 15, 0), (14, 15, 1), (3, 5, 0)])
def test_an_open_clip_caption_that_just_fits_is_not_counted_as_cut(words: int, limit: int | None, cut: int) -> None:
    tower = tiny("open_clip_text")
    tokenizer = tower.contract
    assert isinstance(tokenizer, FixedTokenizer) and tokenizer.context_tokens == 16
    encodings, found = tokenizer.encode(["dog " * words], limit)
    assert found == cut
    ids = [i for i in encodings[0]["input_ids"] if i]
    assert (ids[0], ids[-1], len(ids)) == (49406, 49407, min(words + 2, limit or 16))


@pytest.mark.parametrize(("words", "limit", "cut"), [(10, None, 0), (11, None, 1), (7, 8, 0), (8, 8, 1)])
def test_a_tower_whose_padding_is_its_end_token_counts_what_is_cut(
    tmp_path: Path, words: int, limit: int | None, cut: int
) -> None:
    tokenizer = build_tower(save_open_clip("siglip", tmp_path), "text").contract
    assert isinstance(tokenizer, FixedTokenizer) and tokenizer.context_tokens == 12
    encodings, found = tokenizer.encode(["boat " * words, "boat"], limit)
    assert found == cut
    long, short = ([i for i in encoding["input_ids"] if i != tokenizer.pad_id] for encoding in encodings)
    assert long == [short[0]] + [short[1]] * (min(words + 1, limit or 11) - 1)
    assert sum(encodings[1]["attention_mask"]) == len(short) == 2


def test_a_contract_describes_what_makes_it_that_tokenizer(bert: str, roberta: str) -> None:
    one, other = (build_tower(spec, "text").contract for spec in (bert, roberta))
    assert not isinstance(one, ImageContract) and not isinstance(other, ImageContract)
    assert one.describe() == {
        "class": type(one.tokenizer).__name__,  # type: ignore[attr-defined]
        "vocabulary": VOCABULARY,
        "special_tokens": one.describe()["special_tokens"],
        "context_tokens": 24,
    }
    assert one.describe()["special_tokens"]["pad_token"] == "[PAD]"
    assert other.describe() != one.describe()
