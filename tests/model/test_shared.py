"""The shared encoders, each against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.model import build_shared
from lilt.towers.base import Encoded, Tokens
from tests.model.pairs import patches, words


def built(spec: str, vision: int = 12, text: int = 12) -> Any:
    """A shared encoder in float64 without a tensor that is one number throughout."""
    torch.manual_seed(0)
    encoder = build_shared(spec, vision, text).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def count(encoder: torch.nn.Module) -> int:
    return sum(p.numel() for p in encoder.parameters())


def norm(x: Tensor, module: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(x: Tensor, module: Any) -> Tensor:
    return x @ module.weight.T + module.bias


def slow_block(block: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """One caption's real tokens (L, W) through a pre-norm block, head by head; also the MLP before its activation."""
    length, width = x.shape
    q, k, v = linear(norm(x, block.norm1), block.attn.qkv).view(length, 3, heads, width // heads).unbind(1)
    mixed = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head].T / math.sqrt(width // heads)
        mixed.append((scores.exp() / scores.exp().sum(1, keepdim=True)) @ v[:, head])
    x = x + block.ls1.gamma * linear(torch.cat(mixed, 1), block.attn.proj)
    hidden = linear(norm(x, block.norm2), block.mlp.fc1)
    return x + block.ls2.gamma * linear(gelu(hidden), block.mlp.fc2), hidden


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("side", ["vision", "text"])
def test_the_transformer_is_its_formula_on_the_real_tokens(n: int, pool: str, side: str) -> None:
    encoder = built(f"transformer(n={n},heads=3,pool={pool},points=2)")
    given = words(12, dtype=torch.float64) if side == "text" else patches(12, 2, torch.float64)
    assert given.tokens is not None
    out = encoder(given, side)
    lengths = (3, 5, 2) if side == "text" else (6, 6)
    for row, length in enumerate(lengths):
        x = given.tokens.features[row, :length]
        for block in encoder.blocks:
            x, hidden = slow_block(block, x, 3)
        torch.testing.assert_close(out.tokens.features[row, :length], x, rtol=1e-10, atol=1e-12)
        content = slice(given.tokens.prefix, None)
        for found, expected in ((out.pooled, x), (out.hidden, hidden)):
            chosen = expected[0] if pool == "cls" else expected[content].mean(0)
            torch.testing.assert_close(found[row], chosen, rtol=1e-10, atol=1e-12)


def test_a_second_point_changes_nothing_but_that_it_is_there() -> None:
    one, two = (
        build_shared("transformer(n=2,heads=2)", 12, 12),
        build_shared("transformer(n=2,heads=2,points=2)", 12, 12),
    )
    two.load_state_dict(one.state_dict())
    given = words(12)
    torch.testing.assert_close(one(given, "text").pooled, two(given, "text").pooled)
    assert one(given, "text").hidden is None
    assert two(given, "text").hidden.shape == (3, 48)


def test_what_stands_at_padded_places_is_not_read() -> None:
    given = words(12)
    assert given.tokens is not None and given.tokens.mask is not None
    noise = given.tokens.features + 9.0 * ~given.tokens.mask.unsqueeze(-1)
    other = Encoded(given.pooled, given.tokens._replace(features=noise))
    for spec in ("transformer(pool=mean,points=2)", "transformer(n=2)"):
        encoder = build_shared(spec, 12, 12)
        torch.testing.assert_close(encoder(given, "text").pooled, encoder(other, "text").pooled, rtol=0, atol=0)
        seen = Encoded(given.pooled, Tokens(noise, torch.ones_like(given.tokens.mask)))
        assert (encoder(given, "text").pooled - encoder(seen, "text").pooled).abs().max() > 1e-3


def test_both_branches_start_at_their_scale_and_the_count_is_the_formula() -> None:
    encoder: Any = build_shared("transformer(n=2,heads=4)", 64, 64)
    for block in encoder.blocks:
        assert block.ls1.gamma.tolist() == block.ls2.gamma.tolist() == pytest.approx([0.2] * 64)
    assert count(encoder) == 2 * (12 * 64**2 + 15 * 64)
    assert {b.ls1.gamma[0].item() for b in build_shared("transformer(init_scale=0.5)", 64, 64).blocks} == {0.5}  # type: ignore[union-attr]


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (384, 6), (192, 3), (32, 1), (100, 1), (200, 2)])
def test_heads_are_64_wide_where_the_width_allows(width: int, heads: int) -> None:
    with torch.device("meta"):
        encoder: Any = build_shared("transformer", width, width)
    assert encoder.blocks[0].attn.num_heads == heads


def test_the_mlp_is_three_layers_with_the_middle_one_as_the_second_point() -> None:
    encoder = built("mlp(mlp_ratio=2,points=2)")
    given = words(12, dtype=torch.float64)
    assert given.tokens is not None

    def slow(x: Tensor) -> tuple[Tensor, Tensor]:
        middle = linear(norm(gelu(linear(x, encoder.fc1)), encoder.norm1), encoder.fc2)
        return linear(norm(middle, encoder.norm2), encoder.fc3), middle

    out = encoder(given, "text")
    for found, expected in ((out.pooled, slow(given.pooled)[0]), (out.hidden, slow(given.pooled)[1])):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.tokens.features, slow(given.tokens.features)[0], rtol=1e-10, atol=1e-12)
    assert encoder(Encoded(given.pooled), "text").tokens is None
    assert count(encoder) == (12 + 1) * 24 + 2 * 24 + (24 + 1) * 12 + 2 * 12 + (12 + 1) * 12
    assert built("mlp(mlp_ratio=2)")(given, "text").hidden is None


@pytest.mark.parametrize("spec", ["mlp", "transformer"])
@pytest.mark.parametrize(("vision", "text"), [(8, 12), (12, 8), (12, 12)])
def test_the_narrower_tower_comes_in_over_a_bridge(spec: str, vision: int, text: int) -> None:
    encoder: Any = build_shared(spec, vision, text)
    assert encoder.width == 12
    bridges = sum(width < 12 for width in (vision, text))
    assert count(encoder) == count(build_shared(spec, 12, 12)) + bridges * (8 * 12 + 12)
    for side, width in (("vision", vision), ("text", text)):
        features = torch.randn(3, width)
        expected = (
            F.linear(features, getattr(encoder, side).weight, getattr(encoder, side).bias) if width < 12 else features
        )
        assert torch.equal(encoder.enter(features, side), expected)
    assert encoder(patches(vision), "vision").pooled.shape[1] == encoder(words(text), "text").pooled.shape[1] == 12


@pytest.mark.parametrize("spec", ["mlp", "transformer"])
def test_types_tell_the_sides_apart_once_they_have_learnt_to(spec: str) -> None:
    torch.manual_seed(0)
    encoder: Any = build_shared(f"{spec}(types=true)", 12, 12)
    plain: Any = build_shared(spec, 12, 12)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("types")})
    given = words(12)
    before = [encoder(given, side).pooled for side in ("vision", "text")]
    torch.testing.assert_close(before[0], before[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(before[0], plain(given, "text").pooled, rtol=0, atol=1e-5)
    assert encoder.types_scale.tolist() == pytest.approx([1e-5] * 12) and encoder.types.shape == (2, 12)
    with torch.no_grad():
        encoder.types_scale.fill_(50.0)
    for row, side in enumerate(("vision", "text")):
        features = given.pooled
        torch.testing.assert_close(encoder.enter(features, side), features + 50 * encoder.types[row])
    assert (encoder(given, "vision").pooled - encoder(given, "text").pooled).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "transfromer",
            r"unknown shared encoder 'transfromer'; known: mlp, none, transformer\. Did you mean 'transfor",
        ),
        (
            "transformer(blocks=2)",
            r"transformer has no option 'blocks'; it takes: n, heads, mlp_ratio, init_scale, typ",
        ),
        ("transformer(vision_dim=2)", "transformer has no option 'vision_dim'"),
        ("transformer(n=0)", r"n=0, init_scale=0.2; expected at least one block and a scale above 0; give n=1"),
        ("transformer(init_scale=0)", r"init_scale=0; expected at least one block and a scale above 0"),
        ("transformer(heads=5)", r"heads=5 does not divide the width 12; expected one of 1, 2, 3, 4, 6, 12; give one"),
        ("transformer(pool=maen)", r"unknown pool 'maen'; known: cls, mean\. Did you mean 'mean'\?"),
        ("transformer(points=3)", r"points=3; expected 1 \(the output\) or 2 \(a hidden layer too\); give one"),
        ("mlp(points=0)", "points=0; expected 1"),
        ("mlp(types=perhaps)", "types=perhaps is not a truth value"),
        ("none(n=1)", "none has no option 'n'; it takes: none"),
    ],
)
def test_what_cannot_be_built_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_shared(spec, 12, 8)
