"""Heads: two maps, or one for both, each against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.model import build_projection, projections
from lilt.towers.base import Encoded, Tokens
from tests.model.pairs import patches, words


def count(projection: torch.nn.Module) -> int:
    return sum(p.numel() for p in projection.parameters())


def test_linear_is_one_map_per_tower_into_256_dimensions() -> None:
    heads: Any = build_projection("linear", 8, 12)
    v, t = torch.randn(3, 8), torch.randn(3, 12)
    assert torch.equal(heads.project_vision(Encoded(v)), heads.vision(v))
    assert torch.equal(heads.project_text(Encoded(t)), heads.text(t))
    assert heads.project_text(Encoded(t)).shape == (3, 256) and heads.dim == 256
    assert count(heads) == (8 + 1) * 256 + (12 + 1) * 256


def test_the_keys_of_a_linear_head_are_those_of_old_checkpoints() -> None:
    keys = [f"{side}.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")]
    assert list(build_projection("linear(dim=4)", 8, 12).state_dict()) == keys
    tied = build_projection("linear(dim=4,tied=true)", 8, 12)
    assert list(tied.state_dict()) == [f"{name}.{kind}" for name in ("shared", "vision") for kind in ("weight", "bias")]
    torch.manual_seed(0)
    head: Any = build_projection("linear(dim=4)", 8, 12)
    torch.manual_seed(0)
    assert torch.equal(head.vision.weight, torch.nn.Linear(8, 4).weight)  # the start of old runs too


@pytest.mark.parametrize(("widths", "bridge"), [((8, 8), 0), ((8, 12), 8 * 12 + 12), ((12, 8), 8 * 12 + 12)])
def test_tied_is_one_map_for_both_behind_a_bridge_from_the_narrower(widths: tuple[int, int], bridge: int) -> None:
    heads: Any = build_projection("linear(dim=5,tied=true)", *widths)
    v, t = Encoded(torch.randn(3, widths[0])), Encoded(torch.randn(3, widths[1]))
    assert count(heads) == (max(widths) + 1) * 5 + bridge
    torch.testing.assert_close(heads.project_vision(v), heads.shared(heads.vision(v.pooled)))
    torch.testing.assert_close(heads.project_text(t), heads.shared(heads.text(t.pooled)))
    before = heads.project_vision(v), heads.project_text(t)
    with torch.no_grad():
        heads.shared.bias += 1
    torch.testing.assert_close((heads.project_vision(v), heads.project_text(t)), tuple(x + 1 for x in before))
    if widths[0] == widths[1]:
        torch.testing.assert_close(heads.project_vision(v), heads.project_text(v))


@pytest.mark.parametrize(("hidden", "between"), [("", 4 * 8), (",hidden=5", 5)])
def test_mlp_is_two_layers(hidden: str, between: int) -> None:
    heads: Any = build_projection(f"mlp(dim=3{hidden})", 8, 8).double()
    v = torch.randn(4, 8, dtype=torch.float64)
    first, _, second = heads.vision
    assert first.weight.shape == (between, 8) and second.weight.shape == (3, between)
    x = v @ first.weight.T + first.bias
    expected = x * (1 + torch.erf(x / 2**0.5)) / 2 @ second.weight.T + second.bias
    torch.testing.assert_close(heads.project_vision(Encoded(v)), expected, rtol=1e-10, atol=1e-12)
    assert count(heads) == 2 * ((8 + 1) * between + (between + 1) * 3)


def test_glu_is_gate_times_value_of_the_normalised_features() -> None:
    heads: Any = build_projection("glu(dim=3,expansion=4)", 8, 6).double()
    unit = heads.text
    with torch.no_grad():
        unit.norm.weight.add_(torch.randn(6, dtype=torch.float64))
        unit.gate.weight.mul_(20)  # so that the gate reaches both of its ends
    t = torch.randn(4, 6, dtype=torch.float64)
    x = (t - t.mean(1, keepdim=True)) / (t.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * unit.norm.weight + unit.norm.bias
    gate = (x @ unit.gate.weight.T + unit.gate.bias).clamp(0, 6)
    assert (gate == 0).any() and (gate == 6).any() and ((gate > 0) & (gate < 6)).any()
    expected = (gate * (x @ unit.value.weight.T + unit.value.bias)) @ unit.out.weight.T + unit.out.bias
    torch.testing.assert_close(heads.project_text(Encoded(t)), expected, rtol=1e-10, atol=1e-12)
    assert count(heads) == sum(2 * 4 * w * (w + 1) + (4 * w + 1) * 3 + 2 * w for w in (8, 6))


def test_glu_is_eight_times_as_wide_by_default_and_does_not_see_the_length_of_its_input() -> None:
    heads: Any = build_projection("glu", 8, 6)
    assert heads.vision.gate.weight.shape == (64, 8) and heads.dim == 256
    v = torch.randn(4, 8)
    torch.testing.assert_close(
        heads.project_vision(Encoded(v)), heads.project_vision(Encoded(100 * v)), rtol=0, atol=1e-3
    )


def slow_tokens(map_: Any, tokens: Tensor) -> Tensor:
    """The mean over the given tokens (L, W), one by one."""
    total = torch.zeros(1)
    for token in tokens:
        x = F.layer_norm(token, token.shape, map_.norm.weight, map_.norm.bias)
        bent = F.gelu(x @ map_.mlp[0].weight.T + map_.mlp[0].bias) @ map_.mlp[2].weight.T + map_.mlp[2].bias
        total = total + x @ map_.linear.weight.T + map_.linear.bias + bent
    return total / len(tokens)


def test_tokens_adds_the_mean_of_mapped_words_and_patches() -> None:
    heads: Any = build_projection("tokens(dim=3)", 8, 6).double()
    captions, images = words(6, (3, 5, 2), torch.float64), patches(8, 2, torch.float64)
    assert captions.tokens is not None and images.tokens is not None
    for row, length in enumerate((3, 5, 2)):
        expected = heads.text(captions.pooled[row]) + slow_tokens(
            heads.tokens.text, captions.tokens.features[row, :length]
        )
        torch.testing.assert_close(heads.project_text(captions)[row], expected, rtol=1e-10, atol=1e-12)
    for row in range(2):
        expected = heads.vision(images.pooled[row]) + slow_tokens(heads.tokens.vision, images.tokens.features[row, 2:])
        torch.testing.assert_close(heads.project_vision(images)[row], expected, rtol=1e-10, atol=1e-12)
    assert count(heads) == sum((w + 1) * 3 + 2 * w + 2 * (w + 1) * 3 + (3 + 1) * 3 for w in (8, 6))


def test_tokens_may_be_of_another_width_than_the_pooled_features() -> None:
    heads: Any = build_projection("tokens(dim=3,tied=true)", 16, 6, 8, 6)
    images = Encoded(torch.randn(2, 16), Tokens(torch.randn(2, 5, 8), prefix=1))
    assert heads.project_vision(images).shape == heads.project_text(words(6))[:2].shape == (2, 3)
    assert heads.tokens.shared.linear.weight.shape == (3, 8) and heads.shared.weight.shape == (3, 16)


@pytest.mark.parametrize("spec", ["mlp(dim=5,tied=true)", "glu(dim=5,tied=true)", "tokens(dim=5,tied=true)"])
def test_every_head_can_be_tied(spec: str) -> None:
    heads: Any = build_projection(spec, 8, 8)
    assert torch.equal(heads.project_vision(words(8)), heads.project_text(words(8)))
    bridged: Any = build_projection(spec, 8, 6)
    assert bridged.project_vision(patches(8)).shape[1] == bridged.project_text(words(6)).shape[1] == 5
    untied = count(build_projection(spec.replace(",tied=true", ""), 8, 8))
    assert 2 * count(heads) == untied


def test_none_is_the_features_themselves() -> None:
    heads: Any = build_projection("none", 8, 8)
    v = torch.randn(3, 8)
    assert heads.project_vision(Encoded(v)) is v and heads.dim == 8 and count(heads) == 0
    with pytest.raises(
        ValueError, match=r"none keeps widths as they are, and they are 8 \(vision\) and 6 \(text\); exp"
    ):
        build_projection("none", 8, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("linaer", r"unknown projection 'linaer'; known: glu, linear, mlp, none, tokens\. Did you mean 'linear'\?"),
        ("glu(expand=4)", r"glu has no option 'expand'; it takes: dim, expansion, tied\. Did you mean 'expansion'\?"),
        ("none(dim=4)", "none has no option 'dim'; it takes: none"),
        ("tokens(vision_tokens=4)", "tokens has no option 'vision_tokens'; it takes: dim, tied"),
        ("linear(dims=4)", r"linear has no option 'dims'; it takes: dim, tied\. Did you mean 'dim'\?"),
        ("linear(dim=wide)", "linear: dim=wide is not of type int"),
        ("linear(tied=maybe)", "tied=maybe is not a truth value"),
        ("linear(vision_dim=4)", "linear has no option 'vision_dim'"),
        ("linear(4", r"cannot read .*; expected name or name\(key=value,…\); check the brackets"),
    ],
)
def test_a_misspelt_projection_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_projection(spec, 8, 8)


def test_the_registry_lists_what_there_is() -> None:
    assert projections.names() == ["glu", "linear", "mlp", "none", "tokens"]
