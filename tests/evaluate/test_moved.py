"""Which weights moved: known changes come out with their size and their place."""

from __future__ import annotations

import math

import pytest
import torch

from lilt import DualEncoder
from lilt.evaluate import parse_task
from lilt.evaluate.moved import changes
from lilt.policies import merge, parse_policy
from tests.policies.conformance import tuned
from tests.test_merge import shaken
from tests.towers.families import tiny


def test_a_change_is_reported_at_its_place_and_relative_to_all_of_it() -> None:
    tower, base = tuned("full", tiny("vit")), tiny("vit").body
    with torch.no_grad():
        tower.body.blocks[1].mlp.fc1.weight.mul_(1.1)
        tower.body.blocks[0].attn.qkv.bias.add_(1.0)
        tower.body.pos_embed.mul_(-1)
    found = changes(tower, base, parse_policy("full", "vision"))
    assert found.keys() == {"block 1/mlp", "block 0/attention", "embedding"}
    mlp = torch.cat([p.flatten() for p in base.blocks[1].mlp.parameters()])
    assert found["block 1/mlp"] == pytest.approx(0.1 * base.blocks[1].mlp.fc1.weight.norm().item() / mlp.norm().item())
    attention = torch.cat([p.flatten() for p in base.blocks[0].attn.parameters()])
    assert found["block 0/attention"] == pytest.approx(math.sqrt(96) / attention.norm().item())
    parts = [base.cls_token, base.pos_embed, *base.patch_embed.parameters()]
    embedding = torch.cat([p.flatten() for p in parts])
    assert found["embedding"] == pytest.approx(2 * base.pos_embed.norm().item() / embedding.norm().item())


@pytest.mark.parametrize("family", ["vit", "bert", "open_clip_vision"])
def test_lora_is_folded_into_the_weights_it_moves(family: str) -> None:
    tower = tuned("lora(r=2)", tiny(family))
    base = tiny(family).body
    found = changes(tower, None, parse_policy("lora(r=2)", tower.side))
    assert found.keys() == {"block 0/attention", "block 1/attention"}
    after = dict(merge.merged(tower, parse_policy("lora(r=2)", tower.side)).body.named_parameters())
    for block in (0, 1):
        path = tower.anatomy.blocks[block]
        leaves = {x.path for x in tower.anatomy.leaves if x.block == block and x.role == "attention"}
        own = {n: p for n, p in base.named_parameters() if n.startswith(path) and n.rpartition(".")[0] in leaves}
        moved = sum(float((after[n].detach().double() - p.detach().double()).square().sum()) for n, p in own.items())
        size = sum(float(p.detach().double().square().sum()) for p in own.values())
        assert found[f"block {block}/attention"] == pytest.approx(math.sqrt(moved / size), rel=1e-3)


def test_an_untrained_tower_has_not_moved() -> None:
    for spec in ("full", "frozen", "lora", "ia3", "adapter+layernorm"):
        tower = tuned(spec, tiny("vit"), alive=False)
        base = tiny("vit").body if spec in ("full", "adapter+layernorm") else None
        assert changes(tower, base, parse_policy(spec, "vision")) == {}


def test_the_task_sorts_by_size_and_counts_what_was_added(tiny_vision: str, tiny_text: str) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, vision_policy="adapter+layernorm", text_policy="full")
    found = dict(parse_task("moved")(model))
    for side in ("vision", "text"):
        values = [value for name, value in found.items() if name.startswith(f"{side}/")]
        assert values == sorted(values, reverse=True)
        assert len(values) > 2
    assert {name.rpartition("/")[2] for name in found if name.startswith("vision/")} == {"norm"}
    assert {"text/block 0/attention", "text/block 1/mlp", "text/embedding"} <= found.keys()
    adapters = [row.values for row in model.report() if row.trained and row.rule == "adapter"]
    assert found["num_vision_added"] == sum(adapters) > 0
    assert found["num_text_added"] == 0


def test_the_model_stays_as_it_is(tuned_model: DualEncoder) -> None:
    before = {name: tensor.clone() for name, tensor in tuned_model.state_dict().items()}
    dict(parse_task("moved")(tuned_model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned_model.state_dict().items())


@pytest.fixture
def tuned_model(tiny_vision: str, tiny_text: str) -> DualEncoder:
    return shaken(vision=tiny_vision, text=tiny_text, policy="lora+layernorm")
