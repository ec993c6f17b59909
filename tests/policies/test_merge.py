"""On the way back to a plain tower: folded, switched off, or somewhere between base and tuned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilt.policies import merge, parse_policy
from lilt.policies.attach import Child
from lilt.towers import Tower, build_tower
from tests.policies.conformance import MECHANISMS, PAIRS, run_backward, trained, tuned
from tests.towers.families import CONTRACT, SIDES, Patches, batch, tiny


def merges(spec: str, family: str) -> bool:
    return all(part.mergeable for part in parse_policy(spec, SIDES[family]))


def adds(spec: str, family: str) -> bool:
    """Say whether a policy does more than open what is there; `select` has those that only open."""
    return any(type(part).__module__ != "lilt.policies.select" for part in parse_policy(spec, SIDES[family]))


# a tower of each library and each kind of norm: to exchange a value is the same everywhere
OPENED = [pair for pair in PAIRS if not adds(*pair) and pair[1] in ("vit", "resnet", "bert")]
ADDED = [pair for pair in PAIRS if adds(*pair) and pair[0] in MECHANISMS]
MERGEABLE = [pair for pair in OPENED + ADDED if merges(*pair)]
UNSCALED = ("prompt",)  # no part of its way leads back to the base
# one tower of each way in which libraries store and read weights
FEW = ("vit", "eva02", "beit", "swinv2", "convnext", "open_clip_vision", "own_vision", "bert", "gpt2", "open_clip_text")


def scales(spec: str, family: str) -> bool:
    return not any(part.name in UNSCALED for part in parse_policy(spec, SIDES[family]))


def shaken(spec: str, family: str) -> Tower:
    """Apply a policy and move all that it trains away from where it starts."""
    tower = tuned(spec, tiny(family))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for tensor in trained(tower).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return tower


def merged(spec: str, tower: Tower) -> Tower:
    return merge.merged(tower, parse_policy(spec, tower.side))


@torch.no_grad()
def out(tower: Tower) -> Tensor:
    return tower(batch(tower))


def state(tower: Tower) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*tower.body.named_parameters(), *tower.body.named_buffers())}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(t, other[name]) for name, t in one.items())


def hooks(body: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in body.modules()]


def base_of(tower: Tower, family: str) -> Tower:
    """Return the tower before its policy, with the same parameters frozen: torch chooses its kernels by that too."""
    base = tiny(family)
    opened = {edit.path for edit in merge.changed(tower).values()}
    for name, parameter in base.body.named_parameters():
        parameter.requires_grad_(name in opened)
    return base


@pytest.mark.parametrize(("spec", "family"), MERGEABLE)
def test_merged_is_a_plain_tower_with_the_same_outputs(spec: str, family: str) -> None:
    tower, fresh = shaken(spec, family), tiny(family)
    before, expected, hung = state(tower), out(tower), hooks(tower.body)
    plain = merged(spec, tower)
    # fp32: the folded product is summed in another order; the deepest differences are 2e-6 on values of up to 5
    torch.testing.assert_close(out(plain), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(expected, out(fresh), atol=1e-4) != bool(tower.fates)

    assert [(n, type(m)) for n, m in plain.body.named_modules()] == [
        (n, type(m)) for n, m in fresh.body.named_modules()
    ]
    shapes = [{k: (t.shape, t.dtype) for k, t in t.body.state_dict().items()} for t in (plain, fresh)]
    assert shapes[0] == shapes[1]
    assert not any(parametrize.is_parametrized(module) for module in plain.body.modules())
    out(fresh)  # a library may hang its own hooks in the first call
    assert hooks(plain.body) == hooks(fresh.body)
    assert not any(p.requires_grad for p in plain.parameters()) and not plain.training

    twice = merged(spec, plain)
    assert same(state(twice), state(plain)) and torch.equal(out(twice), out(plain))
    assert same(state(tower), before) and hooks(tower.body) == hung and torch.equal(out(tower), expected)
    assert set(trained(tower)) == set(tower.fates or {})


@pytest.mark.parametrize("spec", ["lora(targets=q|v)", "lora(targets=all,dora=true)", "ia3", "layernorm"])
@pytest.mark.parametrize("family", ["vit", "eva02", "own_vision", "gpt2"])
def test_the_tuned_tower_goes_on_training_as_if_nothing_had_been_merged(spec: str, family: str) -> None:
    towers = [shaken(spec, family), shaken(spec, family)]
    plain = merged(spec, towers[0])
    kept = state(plain)
    for tower in towers:
        optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
        run_backward(tower)
        optimizer.step()
    assert same(state(towers[0]), state(towers[1]))
    assert same(state(plain), kept)


@pytest.mark.parametrize("family", ["vit", "bert", "own_vision"])
def test_a_merged_tower_takes_a_policy_again(family: str) -> None:
    first = merged("lora", shaken("lora", family))
    expected = out(first)
    again = tuned("lora(targets=all)", first)
    assert not torch.allclose(out(again), expected, atol=1e-3)
    assert first.fingerprint != tiny(family).fingerprint
    with merge.disabled(again, None):
        torch.testing.assert_close(out(again), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spec", "family"), [pair for pair in PAIRS if pair[1] in ("vit", "bert") and not merges(*pair)]
)
def test_what_cannot_be_folded_is_refused_by_name_and_nothing_changes(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    before = state(tower)
    names = re.escape("+".join(part.name for part in parse_policy(spec, tower.side) if not part.mergeable))
    message = rf"{names} cannot be merged into the {tower.side} tower 'module:\w+'.*lilt policies.*keep the run"
    with pytest.raises(ValueError, match=message):
        merged(spec, tower)
    assert same(state(tower), before)


def lora_of_blocks(tower: Tower) -> Iterator[tuple[str, Any]]:
    for i, block in enumerate(tower.body.blocks):
        yield f"blocks.{i}.attn.qkv.weight", block.attn.qkv


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_folding_is_in_fp32_whatever_the_type_of_the_model(family: str) -> None:
    tower = shaken("lora(r=2,alpha=6)", family)
    tower.bfloat16()
    found = merged("lora(r=2,alpha=6)", tower).body.state_dict()
    for name, layer in lora_of_blocks(tower):
        inside = parametrize.is_parametrized(layer)
        child = layer.parametrizations.weight[0] if inside else layer.lora
        weight = layer.parametrizations.weight.original if inside else layer.weight
        exact = (weight.float() + 3 * child.b.float() @ child.a.float()).bfloat16()
        torch.testing.assert_close(found[name], exact, rtol=1e-7, atol=0)
        assert not torch.equal(exact, weight + 3 * child.b @ child.a)  # the same in bf16 rounds more


@pytest.mark.parametrize("spec", ["lora", "ia3"])
@pytest.mark.parametrize("family", ["vit", "eva02", "own_vision"])
def test_folding_does_not_see_autocast(spec: str, family: str) -> None:
    tower = shaken(spec, family)
    plain = state(merged(spec, tower))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(state(merged(spec, tower)), plain)


@pytest.mark.parametrize(("spec", "family"), OPENED + ADDED)
def test_disabled_gives_the_base_bit_for_bit_and_leaves_no_trace(spec: str, family: str) -> None:
    tower = shaken(spec, family)
    base = base_of(tower, family)
    before, expected, hung = state(tower), out(tower), hooks(tower.body)
    flags = {name: p.requires_grad for name, p in tower.named_parameters()}
    pure = out(base)
    with merge.disabled(tower, base.body):
        assert torch.equal(out(tower), pure)
        assert torch.allclose(pure, expected, atol=1e-5) != bool(tower.fates)
    assert same(state(tower), before) and hooks(tower.body) == hung
    assert {name: p.requires_grad for name, p in tower.named_parameters()} == flags
    assert torch.equal(out(tower), expected)
    assert same(state(base), state(tiny(family)))


@pytest.mark.parametrize("spec", ["layernorm", "lora(targets=all)", "adapter", "lilt", "full"])
@pytest.mark.parametrize("family", ["vit", "own_text"])
def test_an_error_inside_disabled_leaves_the_tuned_tower(spec: str, family: str) -> None:
    tower = shaken(spec, family)
    before, expected, hung = state(tower), out(tower), hooks(tower.body)
    with pytest.raises(KeyError, match="stop"), merge.disabled(tower, tiny(family).body):
        raise KeyError("stop")
    assert same(state(tower), before) and hooks(tower.body) == hung and torch.equal(out(tower), expected)


def test_the_hooks_of_others_run_on_inside_disabled_and_keep_their_order() -> None:
    tower = shaken("adapter", "vit")
    layer = tower.body.blocks[0].attn.proj
    calls: list[str] = []
    handles = {
        name: layer.register_forward_hook(lambda *_, name=name: calls.append(name)) for name in ("gone", "stays")
    }
    with merge.disabled(tower, None):
        out(tower)
        handles["gone"].remove()
        layer.register_forward_hook(lambda *_: calls.append("new"))
    out(tower)
    assert calls == ["gone", "stays", "stays", "new"]
    assert len(layer._forward_hooks) == 3


@pytest.mark.parametrize(("spec", "family"), [p for p in OPENED + ADDED if p[1] in FEW and scales(*p)])
def test_the_ends_of_the_line_are_the_tuned_tower_and_the_base(spec: str, family: str) -> None:
    tower, base = shaken(spec, family), tiny(family)
    before = state(tower)
    merge.interpolate(tower, base.body, 1.0)
    assert same(state(tower), before)
    merge.interpolate(tower, base.body, 0.0)
    # zeros are added now, which no bit shows, but hooks keep torch's own layers from their fast path
    torch.testing.assert_close(out(tower), out(base_of(tower, family)), rtol=0, atol=1e-6)
    merge.interpolate(tower, base.body, 0.0)
    assert set(trained(tower)) == set(tower.fates or {})


@pytest.mark.parametrize(("spec", "family"), [pair for pair in MERGEABLE if pair[1] in FEW])
def test_halfway_every_weight_lies_on_the_line_from_base_to_tuned(spec: str, family: str) -> None:
    tower, base = shaken(spec, family), tiny(family).body.state_dict()
    tuned_weights = merged(spec, tower).body.state_dict()
    merge.interpolate(tower, tiny(family).body, 0.3)
    for name, weight in merged(spec, tower).body.state_dict().items():
        torch.testing.assert_close(weight, base[name] + 0.3 * (tuned_weights[name] - base[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["adapter", "adapter(place=input)", "deep_adapter"])
def test_what_adapters_and_layers_add_is_scaled(spec: str) -> None:
    tower = shaken(spec, "vit")
    child = next(m for m in tower.body.modules() if isinstance(m, Child))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    added = child(x) - x
    merge.interpolate(tower, None, 0.3)
    if spec != "deep_adapter":
        torch.testing.assert_close(child(x) - x, 0.3 * added, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(child(x) - x, added, atol=1e-3)


@pytest.mark.parametrize("spec", ["lora", "lora(targets=q|v)", "lora(targets=all,dora=true)", "ia3"])
@pytest.mark.parametrize("family", ["eva02", "beit", "own_vision", "open_clip_text"])
def test_parameters_come_back_in_their_order_too(spec: str, family: str) -> None:
    # an optimizer's state and an average of two models go by the order
    names = [name for name, _ in tiny(family).body.named_parameters()]
    assert [name for name, _ in merged(spec, tuned(spec, tiny(family))).body.named_parameters()] == names


@pytest.mark.parametrize(("spec", "family"), [p for p in ADDED if p[1] in ("vit", "bert") and not scales(*p)])
def test_what_has_no_way_back_is_refused_and_whole_it_stays_as_it_is(spec: str, family: str) -> None:
    tower = shaken(spec, family)
    before = state(tower)
    merge.interpolate(tower, None, 1.0)
    with pytest.raises(ValueError, match=r"scale=0\.5; .*expected scale=1; leave the scale out"):
        merge.interpolate(tower, None, 0.5)
    assert same(state(tower), before)


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("layernorm+prompt", "vit"),
        ("lora+prompt(2,deep)", "vit"),
        ("bitfit(blocks=0)+peft(LORA(target_modules=query,use_dora=true))", "bert"),
        ("layernorm+adapter(branches=mlp)+peft(OFT(target_modules=value,r=0,oft_block_size=8))", "bert"),
    ],
)
def test_what_has_no_way_back_is_refused_before_anything_else_has_moved(spec: str, family: str) -> None:
    tower = shaken(spec, family)
    before = state(tower)
    with pytest.raises(ValueError, match=r"scale=0\.5|scaled by 0\.5"):
        merge.interpolate(tower, tiny(family).body, 0.5)
    assert same(state(tower), before)
    merge.check_scalable(tower, 1.0)


class Reading(nn.Module):
    """A block that attends to features of another width: torch's attention then has a weight each for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 40)
        self.attention = nn.MultiheadAttention(32, 2, kdim=40, vdim=40, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)
        return x + self.attention(x, wide, wide, need_weights=False)[0]


def test_several_weights_of_one_module_come_back_in_their_order() -> None:
    body = nn.Sequential(Patches(), Reading(), Reading())
    names = [name for name, _ in body.named_parameters()]
    tower = tuned("lora", build_tower(body, "vision", CONTRACT))
    plain = merged("lora", tower)
    assert len([edit for edit in merge.edits_of(tower) if "attention" in edit.path]) == 6
    assert [name for name, _ in plain.body.named_parameters()] == names
    torch.testing.assert_close(out(plain), out(tower), rtol=1e-5, atol=1e-5)
