"""The published numbers of trained values, hit exactly by plans on the towers they were published for."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig

from lilt.model import Scale, build_projection
from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned
from tests.towers.families import word_tokenizer


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tower, Tower]:
    """ViT-B/16 for 256 px and stock BERT-base, from their configs."""
    folder: Path = tmp_path_factory.mktemp("bert-base")
    BertConfig().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    vision = build_tower("timm:vit_base_patch16_224?pretrained=false", "vision", image_px=256)
    return vision, build_tower(f"hf:{folder}?pretrained=false", "text")


def count(policy: str, towers: tuple[Tower, Tower], token_types: bool = True) -> int:
    vision, text = towers
    heads = [*build_projection("linear", vision.dim, text.dim).parameters(), *Scale().parameters()]
    trained = sum(p.numel() for p in heads) + sum(planned(policy, tower).trained for tower in towers)
    return trained if token_types else trained - text.body.embeddings.token_type_embeddings.weight.numel()


def test_towers_carry_no_classifier_and_no_pooler(towers: tuple[Tower, Tower]) -> None:
    vision, text = (sum(p.numel() for p in tower.parameters()) for tower in towers)
    assert (vision, text) == (85_844_736, 108_891_648)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("frozen", 393_729),
        ("layernorm", 470_529),
        ("bitfit", 598_785),
        ("layernorm+bitfit", 637_185),
        ("bitfit+layernorm", 637_185),
        ("lora(r=8)", 1_131_009),
        ("lora(r=8,targets=q|v)", 983_553),
        ("adapter(4)", 14_595_585),
        ("adapter(reduction=8)", 7_513_089),
        ("adapter(reduction=16,place=input)", 3_971_841),
        ("adapter(64)", 1_315_905),
        ("lilt", 14_672_385),
        ("deep_adapter+layernorm", 14_646_273),
        ("lit", 109_285_377),
        ("full", 195_130_113),
    ],
)
def test_a_policy_trains_as_many_values_as_published(policy: str, expected: int, towers: tuple[Tower, Tower]) -> None:
    assert count(policy, towers) == expected


@pytest.mark.parametrize(("policy", "expected"), [("lit", 109_283_841), ("full", 195_128_577)])
def test_without_token_types_the_counts_are_those_of_the_paper(
    policy: str, expected: int, towers: tuple[Tower, Tower]
) -> None:
    assert count(policy, towers, token_types=False) == expected


def test_the_formulas_hold(towers: tuple[Tower, Tower]) -> None:
    d, n, k = 768, 12, 192
    for tower, outside in zip(towers, (2 * d, d), strict=True):
        assert planned("layernorm", tower).trained == (2 * n + 1) * 2 * d
        assert planned("bitfit", tower).trained == 11 * d * n + outside
        assert planned("adapter", tower).trained == 2 * n * (2 * d * k + k + d)
        assert planned("deep_adapter", tower).trained == 12 * d**2 + 13 * d
        assert planned("last(1)", tower).trained == 12 * d**2 + 13 * d + (2 * d if tower.side == "vision" else 0)
        assert planned("attention", tower).trained == n * (4 * d**2 + 4 * d)
        assert planned("mlp", tower).trained == n * (8 * d**2 + 5 * d)
