"""A tower that begins behind its frozen front gives the same features and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilt.policies import apply, parse_policy, plan
from lilt.towers import Tower, TowerSpec, build_tower
from lilt.towers.base import ImageContract
from lilt.towers.find_front import find_front
from lilt.towers.front import Front
from lilt.towers.vision import wrap_vision
from tests.towers.families import FAMILIES, SIDES, VIT, batch, timm_tower, tiny, tokens

# T5 hands the position bias of its first block on to the others; own_mlp is one block without a norm
FRONTLESS = {"t5", "own_mlp"}
POLICIES = ["layernorm(blocks=last:1)", "lora(r=2,blocks=last:1)", "last(1)", "deep_adapter"]


# no tokens (B, L, D) behind their blocks, no attention in them
REFUSED = {(f, p) for f in ("swin", "swinv2", "convnext", "resnet") for p in ("deep_adapter", "prompt")}
REFUSED |= {(f, "lora(r=2,blocks=last:1)") for f in ("convnext", "resnet")}
PAIRS = [(f, p) for f in FAMILIES if f not in FRONTLESS for p in POLICIES if (f, p) not in REFUSED]


def tuned(family: str, policy: str) -> Tower:
    tower = tiny(family)
    apply(plan(parse_policy(policy, tower.side), tower), tower)
    for p in tower.parameters():
        if p.requires_grad and not p.any():  # what starts at zero would hide what it is given
            p.data.normal_(0, 0.1)
    return tower


def outcome(tower: Tower, inputs: Any) -> dict[str, Tensor]:
    tower.zero_grad()
    features = tower(inputs)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    grads = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    return grads | {"features": features.detach()}


@pytest.mark.parametrize(("family", "policy"), PAIRS)
def test_features_and_gradients_are_those_of_the_whole_tower(family: str, policy: str) -> None:
    tower = tuned(family, policy)
    front = find_front(tower)
    assert front is not None
    assert front.blind == (SIDES[family] == "vision")
    inputs = batch(tower)
    expected = outcome(tower, inputs)
    stored = front.record(inputs)
    assert not stored.requires_grad
    with front.resumed(stored):
        again = outcome(tower, front.blank(stored) if front.blind else inputs)
    assert expected.keys() == again.keys()
    assert len(expected) > 1
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=name)
    # afterwards the tower is whole again
    torch.testing.assert_close(tower(inputs), expected["features"], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "bert", "swin"])
def test_what_is_stored_counts_and_the_blocks_before_are_not_run(family: str) -> None:
    tower = tuned(family, "layernorm(blocks=last:1)")
    front = find_front(tower)
    assert front is not None
    inputs = batch(tower)
    stored = front.record(inputs)
    ran: list[str] = []
    inner = tower.body.get_submodule(front.last)
    leaf = next(m for m in inner.modules() if isinstance(m, nn.Linear))
    leaf.register_forward_hook(lambda *_: ran.append("front"))
    given = front.blank(stored) if front.blind else inputs
    with front.resumed(stored), torch.no_grad():
        one = tower(given)
    with front.resumed(stored * 1.5), torch.no_grad():
        other = tower(given)
    assert not ran
    assert (one - other).abs().max() > 1e-4


def test_captions_of_another_length_than_the_proofs_resume() -> None:
    tower = tuned("bert", "layernorm(blocks=last:1)")
    front = find_front(tower)
    assert front is not None
    for captions in (("a",), ("a red boat under the big blue house near the small dog", "two", "cat")):
        inputs = tokens(tower, *captions)
        with front.resumed(front.record(inputs)):
            again = tower(inputs)
        assert torch.equal(again, tower(inputs))


@pytest.mark.parametrize("family", ["vit", "bert", "modernbert"])
@pytest.mark.parametrize("policy", ["full", "layernorm", "prompt", "lora"])
def test_where_the_first_block_trains_there_is_no_front(family: str, policy: str) -> None:
    assert find_front(tuned(family, policy)) is None


@pytest.mark.parametrize("family", sorted(FRONTLESS))
def test_a_front_that_cannot_be_put_back_is_none(family: str) -> None:
    tower = tiny(family)
    apply(plan(parse_policy("frozen", tower.side), tower), tower)
    assert find_front(tower, tokens=True) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_locked_tower_is_its_own_front(family: str) -> None:
    tower = tiny(family)
    apply(plan(parse_policy("frozen", tower.side), tower), tower)
    front = find_front(tower)
    assert front is not None and front.blind
    inputs = batch(tower)
    expected = tower(inputs)
    stored = front.record(inputs)
    assert stored.shape == (len(expected), tower.dim)
    torch.testing.assert_close(stored, tower.eval()(inputs), rtol=0, atol=0)
    with front.resumed(stored * 2):
        torch.testing.assert_close(tower(inputs), stored * 2, rtol=0, atol=0)
    assert "forward" not in tower.__dict__


def test_the_front_is_still_in_training_and_what_is_behind_it_drops() -> None:
    tower = tuned("bert", "layernorm(blocks=last:1)")
    front = find_front(tower)
    assert front is not None
    drops = {n: m for n, m in tower.body.named_modules() if isinstance(m, nn.Dropout)}
    assert {n in front.still for n in drops} == {True, False}
    tower.still = front.still
    tower.train()
    assert {n for n, m in drops.items() if not m.training} == {n for n in drops if n in front.still}
    both = []
    for _ in range(2):
        with front.recording() as kept:
            out = tower(batch(tower))
        both.append((kept[0], out))
    assert torch.equal(both[0][0], both[1][0])
    assert not torch.equal(both[0][1], both[1][1])


class Restless(nn.Module):
    """A network that drops without a module that could be told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.dropout(self.patch(images), 0.5, self.training).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


def test_a_front_that_cannot_be_kept_still_is_none() -> None:
    tower = build_tower(Restless(), "vision", ImageContract(32), roles={"layers.*": "block"})
    apply(plan(parse_policy("layernorm(blocks=last:1)", "vision"), tower), tower)
    assert find_front(tower) is None


def test_the_front_reaches_to_the_first_trained_block() -> None:
    tiny_depth = 4
    for trained in range(1, tiny_depth):
        tower = timm_tower("vit_tiny_patch16_224", **(VIT | {"depth": tiny_depth}))
        apply(plan(parse_policy(f"layernorm(blocks=last:{trained})", "vision"), tower), tower)
        front = find_front(tower)
        assert front is not None
        assert front.last == f"blocks.{tiny_depth - trained - 1}"


class Skipping(nn.Module):
    """A network whose head looks at the first block once more."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        first = x = self.layers[0](self.patch(images).flatten(2).transpose(1, 2))
        for layer in list(self.layers)[1:]:
            x = layer(x)
        return x.mean(1) + first.mean(1)


def test_a_tower_that_looks_back_is_not_cut() -> None:
    tower = build_tower(Skipping(), "vision", ImageContract(32), roles={"layers.*": "block"})
    apply(plan(parse_policy("layernorm(blocks=last:1)", "vision"), tower), tower)
    assert find_front(tower) is None


def test_modes_and_hooks_are_left_as_they_were() -> None:
    tower = tuned("bert", "layernorm(blocks=last:1)")
    tower.train()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules())
    front = find_front(tower)
    assert isinstance(front, Front)
    assert all(m.training for m in tower.modules())
    front.record(batch(tower))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules()) == hooks
    assert not any("forward" in m.__dict__ for m in tower.modules())


class WorksInPlace(nn.Module):
    """Its second block begins by changing what the first one gave."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        second = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(16, 16))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()), second])

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_front_whose_output_is_changed_in_place_is_none(inplace: bool) -> None:
    torch.manual_seed(0)
    spec = TowerSpec("module", roles={"blocks.*": "block"})
    tower = wrap_vision(WorksInPlace(inplace), ImageContract(32), "mine", spec)
    apply(plan(parse_policy("blocks(blocks=last:1)", "vision"), tower), tower)
    assert (find_front(tower) is None) == inplace
