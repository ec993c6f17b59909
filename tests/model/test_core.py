"""Two towers, a projection and a scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lilt.model import Embeddings, Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.towers import build_tower
from tests.towers.families import CONTRACT, batch, tiny


def model(vision: str = "vit", text: str = "bert", policy: str = "layernorm") -> TwoTower:
    towers = tiny(vision), tiny(text)
    for tower in towers:
        apply(plan(parse_policy(policy, tower.side), tower), tower)
    torch.manual_seed(0)
    return TwoTower(*towers, build_projection("linear(dim=16)", towers[0].dim, towers[1].dim), Scale())


def embed(two: TwoTower) -> Embeddings:
    return two(batch(two.vision), batch(two.text))


def test_embeddings_have_unit_length_and_the_scale_is_positive() -> None:
    image, text, scale, features, hidden, bias = embed(model())
    for rows in (image, text):
        assert rows.shape == (3, 16)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert features is not None and hidden is None and bias is None
    for rows, long in zip((image, text), features, strict=True):
        torch.testing.assert_close(rows, long / long.norm(dim=1, keepdim=True))


def test_three_values_are_enough_for_embeddings() -> None:
    rows = torch.eye(2)
    assert Embeddings(rows, rows, torch.tensor(1.0))[3:] == (None, None, None)


def test_embeddings_stay_in_fp32_under_autocast() -> None:
    two = model()
    exact = embed(two)
    with torch.autocast("cpu", torch.bfloat16):
        found = embed(two)
    assert found.features is not None and {rows.dtype for rows in found.features} == {torch.float32}
    for rough, fine in zip(found[:3], exact[:3], strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, fine, rtol=0.02, atol=0.05)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(3), rtol=1e-6, atol=1e-6)


def test_a_projection_of_nothing_is_not_a_number_of_trouble() -> None:
    two = model()
    with torch.no_grad():
        for tensor in two.projection.parameters():
            tensor.zero_()
    assert embed(two).image.isfinite().all()


def test_trained_names_heads_scale_and_what_the_policy_opened() -> None:
    two = model(policy="layernorm")
    names = set(two.trained())
    heads = {f"projection.{side}.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")} | {"scale.log"}
    assert heads <= names
    assert {n for n in names - heads if not n.startswith(("vision.body.", "text.body."))} == set()
    opened = {f"{side}.body.{n}" for side in ("vision", "text") for n in getattr(two, side).fates}
    assert names == heads | opened
    assert set(model(policy="frozen").trained()) == heads


@pytest.mark.parametrize(("policy", "vision", "text"), [("lit", False, True), ("frozen", False, False)])
def test_a_locked_tower_stays_in_eval_mode(policy: str, vision: bool, text: bool) -> None:
    two = model(policy=policy).train()
    assert (two.vision.training, two.text.training, two.training) == (vision, text, True)
    assert {m.training for m in two.vision.modules()} == {vision}
    two.eval()
    assert not any(m.training for m in two.modules())


def test_dropout_of_a_locked_tower_stays_off_and_of_a_trained_one_goes_on() -> None:
    locked, trained = model(policy="frozen").train(), model(policy="layernorm").train()
    inputs = batch(locked.text)
    assert torch.equal(locked.encode_text(inputs), locked.encode_text(inputs))
    assert not torch.equal(trained.encode_text(inputs), trained.encode_text(inputs))


@pytest.mark.parametrize("policy", ["frozen", "full", "layernorm"])
def test_stored_statistics_stay_as_pretrained(policy: str) -> None:
    if policy == "full":
        two = model("resnet", policy="full").train()
    else:
        net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8))
        vision = build_tower(net, "vision", CONTRACT)
        apply(plan(parse_policy(policy, "vision"), vision), vision)
        text = tiny("bert")
        two = TwoTower(vision, text, build_projection("linear(dim=16)", 8, 32), Scale()).train()
    before = {name: buffer.clone() for name, buffer in two.vision.named_buffers()}
    assert any("running_mean" in name for name in before)
    embed(two).image.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in two.vision.named_buffers())


def test_the_scale_is_clamped_after_a_step_and_its_gradient_never_dies() -> None:
    scale = Scale(start=90.0, low=1.0, high=100.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    for sign, bound in ((-1.0, 100.0), (1.0, 1.0)):
        for _ in range(3):
            optimizer.zero_grad()
            (sign * scale().log() * 5).backward()
            assert scale.log.grad is not None and scale.log.grad.abs() > 0
            optimizer.step()
            scale.clamp_()
        assert scale().item() == pytest.approx(bound)


def test_the_published_range_of_temperatures_can_be_had() -> None:
    scale = Scale(1 / 0.07, low=1 / 0.5, high=1 / 0.001)
    assert (scale.low, scale.high) == (math.log(1 / 0.5), math.log(1 / 0.001))


@pytest.mark.parametrize("bounds", [(0.5, 1.0, 100.0), (200.0, 1.0, 100.0), (1.0, 0.0, 100.0)])
def test_a_scale_outside_its_range_is_an_error(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"scale starts at .* outside \[.*\]; give 0 < scale_min <= scale"):
        Scale(*bounds)
