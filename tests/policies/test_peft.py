"""Configurations of the peft library in a tower: as peft itself does it, or refused by reason."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lilt
from lilt.policies import apply, parse_policy
from lilt.policies.injection import Inject, is_layer, put_in
from lilt.policies.merge import disabled, interpolate, merged
from lilt.policies.peft import Peft, written_out
from lilt.policies.peft_config import Config
from lilt.towers import Tower
from tests.policies.conformance import planned, run_backward, trained, tuned
from tests.towers.families import batch, tiny

# peft's type and options, and how many values it trains in a BERT or ViT of width 32, depth 2, mlp 48 (ViT: 128)
TEXT: dict[str, int] = {
    "LORA(r=4,target_modules=query|value)": 4 * 4 * (32 + 32),
    "LORA(r=4,target_modules=query|value,lora_bias=true)": 4 * (4 * (32 + 32) + 32),
    "LORA(r=4,target_modules=query|value,use_dora=true)": 4 * (4 * (32 + 32) + 32),
    "LORA(r=4,target_modules=query,bias=lora_only)": 2 * (4 * (32 + 32) + 32),
    "LORA(r=4,target_modules=word_embeddings)": 4 * (18 + 32),
    "LORA(r=4,target_modules=query,modules_to_save=LayerNorm)": 2 * 4 * (32 + 32) + 5 * 2 * 32,
    "LORA(r=4,target_modules=query,trainable_token_indices=0|3)": 2 * 4 * (32 + 32) + 2 * 32,
    "LORA(r=4,target_modules=query,layers_to_transform=1)": 4 * (32 + 32),
    "LORA(r=4,target_modules=[],target_parameters=self.key.weight)": 2 * 4 * (32 + 32),
    "LORA": 2 * 2 * 8 * (32 + 32),  # peft knows BERT's query and value
    "IA3(target_modules=key|value|output.dense,feedforward_modules=output.dense)": 2 * (32 + 32 + 32 + 48),
    "LOHA(r=2,target_modules=query)": 2 * 4 * 2 * 32,
    "LOKR(r=2,target_modules=query)": 2 * (16 + 2 * 2 * 8),
    "OFT(r=0,oft_block_size=4,target_modules=query)": 2 * 8 * 6,
    "VERA(r=4,target_modules=query)": 2 * (4 + 32),
    "LN_TUNING(target_modules=LayerNorm)": 5 * 2 * 32,
}  # fmt: skip
VISION: dict[str, int] = {
    "LORA(r=4,target_modules=qkv|fc1)": 2 * 4 * (32 + 96 + 32 + 128),
    "LORA(r=4,target_modules=proj)": 4 * (3 * 8 * 8 + 32) + 2 * 4 * (32 + 32),  # the patch embedding's too
    "LOHA(r=2,target_modules=qkv)": 2 * 2 * 2 * (32 + 96),
    "LN_TUNING(target_modules=norm1|norm2)": 4 * 2 * 32,
}  # fmt: skip
CASES = [("bert", text) for text in TEXT] + [("vit", text) for text in VISION]
every_case = pytest.mark.parametrize(("family", "text"), CASES)


def spec(text: str) -> str:
    return f"peft({text})"


def stirred(tower: Tower) -> Tower:
    """Move every trained tensor away from where it started."""
    chance = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in trained(tower).values():
            tensor.add_(torch.randn(tensor.shape, generator=chance), alpha=0.5)
    return tower


def output(tower: Tower) -> Tensor:
    with torch.no_grad():
        return tower(batch(tower))


@every_case
def test_it_trains_what_peft_trains_with_the_same_outputs_and_gradients(family: str, text: str) -> None:
    tower = stirred(tuned(spec(text), tiny(family)))
    twin = tiny(family)
    model: Any = peft.get_peft_model(twin.body, Config.parse(text).build())
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model."
    assert {prefix + name for name in trained(tower)} == set(theirs)
    assert planned(spec(text), tiny(family)).trained == sum(p.numel() for p in theirs.values())
    assert planned(spec(text), tiny(family)).trained == (TEXT | VISION)[text]
    with torch.no_grad():
        for name, tensor in trained(tower).items():
            theirs[prefix + name].copy_(tensor)
    twin.eval()
    # peft's model goes through its own forward; the tower reads what comes out of it
    twin.body = model
    assert torch.equal(run_backward(tower), run_backward(twin))
    for name, tensor in trained(tower).items():
        assert tensor.grad is not None and tensor.grad.any(), name
        assert torch.equal(tensor.grad, theirs[prefix + name].grad), name


@every_case
def test_only_trained_tensors_change_and_every_one_has_an_edit(family: str, text: str) -> None:
    tower = tuned(spec(text), tiny(family))
    assert tower.fates is not None and set(tower.fates) == set(trained(tower))
    assert {edit.rule for edit in tower.fates.values()} == {"peft"}
    assert sum(edit.count for edit in dict.fromkeys(tower.fates.values())) == (TEXT | VISION)[text]
    before = {name: tensor.clone() for name, tensor in tower.body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        run_backward(tower)
        optimizer.step()
    moved = {name for name, tensor in tower.body.state_dict().items() if not torch.equal(tensor, before[name])}
    # under trainable_token_indices peft registers the wrapped embedding twice, and neither copy moves
    assert moved == set(trained(tower))


@every_case
def test_folding_gives_the_same_outputs_from_a_body_of_the_old_classes_and_keys(family: str, text: str) -> None:
    tower = stirred(tuned(spec(text), tiny(family)))
    flags = {name for name in trained(tower) if "base_layer" in name}
    plain = merged(tower, parse_policy(spec(text), tower.side))
    base = tiny(family)
    assert not torch.allclose(output(plain), output(base), atol=1e-4)
    torch.testing.assert_close(output(plain), output(tower), rtol=0, atol=1e-5)
    assert [(n, type(m)) for n, m in plain.body.named_modules()] == [(n, type(m)) for n, m in base.body.named_modules()]
    assert list(plain.body.state_dict()) == list(base.body.state_dict())
    assert not any(is_layer(module) for module in plain.modules())
    assert not trained(plain)
    assert {name for name in trained(tower) if "base_layer" in name} == flags  # the tuned tower is left alone
    # a plain tower can be tuned again
    assert tuned(spec(text), plain).fates


@every_case
def test_switched_off_it_gives_the_base_bit_for_bit_and_on_again_trains_the_same(family: str, text: str) -> None:
    base = tiny(family)
    tower = stirred(tuned(spec(text), tiny(family)))
    on, names = output(tower), set(trained(tower))
    assert not torch.equal(on, output(base))
    with disabled(tower, base.body):
        assert torch.equal(output(tower), output(base))
        assert set(trained(tower)) == names
    assert torch.equal(output(tower), on)
    assert set(trained(tower)) == names


@pytest.mark.parametrize(
    "text",
    [
        "LORA(r=4,target_modules=query|value)",
        "LORA(r=4,target_modules=query,lora_bias=true)",
        "LORA(r=4,target_modules=query,use_rslora=true)",
        "LORA(r=4,target_modules=word_embeddings)",
        "LOHA(r=2,target_modules=query)",
        "LOKR(r=2,target_modules=query)",
        "LOKR(r=2,target_modules=query,decompose_both=true)",
        "VERA(r=4,target_modules=query)",
    ],
)
def test_rescaling_an_update_moves_the_folded_weights_along_a_line(text: str) -> None:
    tower = stirred(tuned(spec(text), tiny("bert")))
    parts = parse_policy(spec(text), "text")
    ends = tiny("bert").body.state_dict(), merged(tower, parts).body.state_dict()
    interpolate(tower, None, 0.25)
    between = merged(tower, parts).body.state_dict()
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in between)
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, torch.lerp(ends[0][name], ends[1][name], 0.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["IA3(target_modules=key,feedforward_modules=key)", "LORA(r=4,target_modules=query,use_dora=true)"]
)
def test_an_update_that_is_not_proportional_to_a_tensor_is_not_scaled(text: str) -> None:
    tower = tuned(spec(text), tiny("bert"))
    with pytest.raises(ValueError, match=r"at encoder\.layer\..* cannot be scaled by 0\.5: .*; use it whole"):
        interpolate(tower, None, 0.5)


def test_layernorm_tuning_is_the_same_as_the_policy_layernorm() -> None:
    theirs = tuned("peft(LN_TUNING(target_modules=LayerNorm))", tiny("bert"))
    ours = tuned("layernorm", tiny("bert"))
    assert planned("layernorm", tiny("bert")).trained == sum(p.numel() for p in trained(theirs).values())
    assert torch.equal(run_backward(theirs), run_backward(ours))
    for (_, a), (_, b) in zip(trained(theirs).items(), trained(ours).items(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_a_plan_needs_no_weights_and_touches_none() -> None:
    tower = tiny("bert")
    versions = [p._version for p in tower.parameters()]
    count = planned("peft", tower).trained
    assert [p._version for p in tower.parameters()] == versions
    assert not any(is_layer(module) for module in tower.modules())
    tower.body.to("meta")
    assert planned("peft", tower).trained == count


def test_new_layers_are_in_the_mode_of_the_tower_so_that_nothing_drops_out() -> None:
    tower = tuned("peft(LORA(target_modules=query,lora_dropout=0.5))", tiny("bert"))
    assert not any(module.training for module in tower.body.modules())
    assert torch.equal(output(tower), output(tower))
    tower.train()
    assert not torch.equal(output(tower), output(tower))


@pytest.mark.parametrize("text", ["LORA(target_modules=query)", "LN_TUNING(target_modules=LayerNorm)"])
def test_masters_are_fp32_on_a_bf16_body_and_folding_keeps_its_type(text: str) -> None:
    tower = tiny("bert")
    tower.body.to(torch.bfloat16)
    apply(planned(spec(text), tower), tower)
    assert trained(tower) and all(p.dtype == torch.float32 for p in trained(tower).values())
    for edit in (tower.fates or {}).values():
        edit.fold(tower.body)
    assert {p.dtype for p in tower.body.parameters()} == {torch.bfloat16}
    assert list(tower.body.state_dict()) == list(tiny("bert").body.state_dict())


def test_a_bias_that_the_configuration_opens_belongs_to_peft() -> None:
    tower = tuned("peft(LORA(r=4,target_modules=query,bias=all))", tiny("bert"))
    biases = {name for name in trained(tower) if name.endswith("bias")}
    assert {n.replace(".base_layer", "") for n in biases} == {
        n for n, _ in tiny("bert").body.named_parameters() if n.endswith("bias")
    }
    assert {(tower.fates or {})[name].why for name in biases} == {"opened by the LORA configuration"}


@pytest.mark.parametrize("other", ["layernorm", "bitfit", "layernorm+bitfit", "deep_adapter"])
def test_composed_with_another_policy_either_order_trains_the_same(other: str) -> None:
    mine = "peft(LORA(r=4,target_modules=query|value))"
    towers = [stirred(tuned(s, tiny("bert"))) for s in (f"{mine}+{other}", f"{other}+{mine}")]
    first, second = (trained(tower) for tower in towers)
    alone = planned(mine, tiny("bert")).trained + planned(other, tiny("bert")).trained
    assert set(first) == set(second) and sum(p.numel() for p in first.values()) == alone
    for tower in towers:
        assert tower.fates is not None and set(tower.fates) == set(first)
        assert {edit.rule for edit in tower.fates.values()} == {
            "peft",
            *(t.partition("(")[0] for t in other.split("+")),
        }
        run_backward(tower)
        assert all(p.grad is not None for p in trained(tower).values())
    with torch.no_grad():
        for name, tensor in first.items():
            second[name].copy_(tensor)
    assert torch.equal(output(towers[0]), output(towers[1]))
    if "adapter" not in other:
        parts = parse_policy(f"{other}+{mine}", "text")
        torch.testing.assert_close(output(merged(towers[0], parts)), output(towers[0]), rtol=0, atol=1e-5)


QUERY = "peft(LORA(target_modules=query))"
CLASHES = {
    f"{QUERY}+lora": r"both want encoder\.layer\.0\.attention\.self\.query\.weight",
    f"{QUERY}+full": r"both want encoder\.layer\.0\.attention\.self\.query\.weight",
    "peft(LORA(target_modules=query,lora_bias=true))+bitfit": r"both want .*self\.query\.bias",
    "peft(LN_TUNING(target_modules=LayerNorm))+layernorm": r"both want embeddings\.LayerNorm\.weight",
    "peft(LN_TUNING(target_modules=LayerNorm))+bitfit": r"both want embeddings\.LayerNorm\.bias",
    "peft(LORA(target_modules=query,modules_to_save=intermediate))+mlp": r"both want .*intermediate\.dense\.weight",
    "peft(LORA(target_modules=query,modules_to_save=intermediate))+bitfit": r"both want .*intermediate\.dense\.bias",
    "peft+adapter": r"peft and adapter both want the module encoder\.layer\.0\.attention\.output\.dense; a module",
    f"{QUERY}+peft(IA3(target_modules=key,feedforward_modules=key))": "peft twice on one tower; expected one",
}


@pytest.mark.parametrize("clash", CLASHES)
@pytest.mark.parametrize("reverse", [False, True])
def test_what_another_policy_wants_too_is_an_error_in_either_order(clash: str, reverse: bool) -> None:
    joined = "+".join(reversed(clash.rsplit("+", 1))) if reverse else clash
    with pytest.raises(ValueError, match=CLASHES[clash]):
        planned(joined, tiny("bert"))


REFUSALS = {
    ("bert", "LORA(target_modules=query|valeu)"): r"target_modules=valeu matches nothing in it; .*mean 'value'\?",
    ("bert", "LORA(target_modules=query,modules_to_save=head)"): "modules_to_save=head matches nothing in it",
    ("bert", "LORA(target_parameters=self.key.wight)"): "target_parameters=self.key.wight matches nothing in it",
    ("bert", "LORA(target_modules=.*nix.*)"): "peft cannot put it in",
    ("bert", "LORA(target_modules=attention)"): r"peft cannot put it in \(ValueError: Target module BertAttention",
    ("bert", "LORA(target_modules=query,r=0)"): "peft cannot put it in",
    ("bert", "SHIRA(r=2,target_modules=query)"): "its start is computed from the weights, and a plan sees none",
    ("vit", "LORA"): "peft cannot put it in .*specify `target_modules`",
    ("vit", "LN_TUNING(target_modules=q_norm)"): r"matches blocks\.0\.attn\.q_norm, which has no weights; .*layernorm",
    ("resnet", "LORA(target_modules=all-linear)"): "has no linear layers; it has 4 blocks",
    ("eva02", "LORA(target_modules=qkv)"): r"that of blocks\.0\.attn\.qkv is never called: its .*or use lora",
    ("beit", "LORA(target_modules=qkv)"): r"that of blocks\.0\.attn\.qkv is never called",
    ("swinv2", "IA3(target_modules=qkv,feedforward_modules=qkv)"): r"attn\.qkv is never called: .*or use ia3",
    ("open_clip_vision", "LORA(target_modules=out_proj)"): r"that of .*attn\.out_proj is never called",
    ("open_clip_text", "LORA(target_modules=attn)"): r"peft applies its update of .*attn\.out_proj twice",
    ("own_vision", "LORA(target_modules=linear1)"): r"torch reads the weight of layers\.0\.linear1 past peft's layer",
    ("own_text", "LN_TUNING(target_modules=norm1)"): r"torch reads the weight of layers\.0\.norm1 past peft's layer",
}  # fmt: skip


@pytest.mark.parametrize(("family", "text"), REFUSALS)
def test_what_a_tower_does_not_allow_is_refused_by_reason_and_leaves_it_alone(family: str, text: str) -> None:
    tower = tiny(family)
    before = {name: tensor.clone() for name, tensor in tower.body.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSALS[family, text]) as refusal:
        planned(spec(text), tower)
    assert f"the {tower.side} tower {tower.spec!r}" in str(refusal.value)
    assert f"it has {tower.anatomy.describe()}" in str(refusal.value)
    assert {n: t for n, t in tower.body.state_dict().items() if torch.equal(t, before[n])}.keys() == before.keys()


@pytest.mark.parametrize(
    ("family", "text"),
    [(f, t) for f, t in REFUSALS if "never called" in REFUSALS[f, t] or "linear1" in t],
)
def test_what_is_refused_as_dead_is_dead_when_peft_does_it(family: str, text: str) -> None:
    tower = tiny(family)
    base = output(tower)
    put_in(tower.body, Config.parse(text).build())
    assert trained(tower)
    assert torch.equal(output(stirred(tower)), base)


def test_what_is_refused_as_counted_twice_is_counted_twice_by_peft() -> None:
    # if this fails, peft has mended it and the refusal can go
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    holder = nn.ModuleDict({"attn": copy.deepcopy(attention)})
    put_in(holder, Config.parse("LORA(r=2,target_modules=attn)").build())
    around: Any = holder["attn"]
    layer = around.base_layer.out_proj
    with torch.no_grad():
        nn.init.normal_(layer.lora_B["default"].weight)
        delta = layer.get_delta_weight("default")
        x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
        outputs = [around(x, x, x)[0]]
        for factor in (1, 2):
            plain = copy.deepcopy(attention)
            plain.out_proj.weight += factor * delta
            outputs.append(plain(x, x, x)[0])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2])


@pytest.mark.skipif(not hasattr(peft, "UniLoraConfig"), reason="this peft has no tuner with one tensor for all layers")
def test_layers_that_share_one_tensor_are_switched_and_folded_with_it() -> None:
    text = "UNILORA(target_modules=query|value)"
    tower = stirred(tuned(spec(text), tiny("bert")))
    assert len(trained(tower)) == 1
    (edit,) = set((tower.fates or {}).values())
    assert isinstance(edit, Inject) and len(edit.also) == 3
    with disabled(tower, None):
        assert torch.equal(output(tower), output(tiny("bert")))
    plain = merged(tower, parse_policy(spec(text), "text"))
    torch.testing.assert_close(output(plain), output(tower), rtol=0, atol=1e-5)
    assert list(plain.body.state_dict()) == list(tiny("bert").body.state_dict())
    with pytest.raises(ValueError, match=r"both want encoder\.layer\.1\.attention\.self\.value\.weight"):
        planned(f"{spec(text)}+lora(targets=v,blocks=last:1)", tiny("bert"))


@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="this peft has no tuner that does not merge")
def test_what_peft_cannot_fold_is_an_error() -> None:
    tower = tuned("peft(LILY(target_modules=query))", tiny("bert"))
    with pytest.raises(ValueError, match="LILY of the peft library does not merge: peft cannot fold"):
        merged(tower, parse_policy("peft", "text"))


def test_a_checkpoint_is_rebuilt_from_the_words_alone(tiny_vision: str, tiny_text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    made = peft.LoraConfig(r=2, lora_alpha=32, target_modules="encoder.*(query|value)", rank_pattern={"query": 3})
    made.save_pretrained(str(tmp_path))
    policy = written_out(f"peft({file})+layernorm(blocks=last:1)")
    model = lilt.DualEncoder.build(tiny_vision, tiny_text, "peft(IA3(target_modules=qkv,feedforward_modules=qkv))",
                                   text_policy=policy)  # fmt: skip
    stirred(model.core.vision)
    stirred(model.core.text)
    texts = ["a red boat", "all of it is paper"]
    wanted = model.embed(texts=texts)["text"]
    model.save(tmp_path / "run")
    file.unlink()

    again = lilt.load(tmp_path / "run")
    assert again.config.text_policy == policy
    assert set(again.core.trained()) == set(model.core.trained())
    assert torch.equal(again.embed(texts=texts)["text"], wanted)
    rules = {row.name: row.rule for row in again.report() if row.trained}
    assert rules["vision.blocks.0.attn.qkv.ia3_l.default"] == "peft"
    assert rules["text.encoder.layer.1.attention.self.query.lora_A.default.weight"] == "peft"
    assert rules["text.encoder.layer.1.output.LayerNorm.weight"] == "layernorm"
    sizes = {name: tuple(p.shape) for name, p in again.core.trained().items() if "lora_A" in name}
    assert {size[0] for name, size in sizes.items() if "query" in name} == {3}
    assert {size[0] for name, size in sizes.items() if "value" in name} == {2}


def test_a_configuration_made_in_python_is_a_policy_too(tiny_vision: str, tiny_text: str) -> None:
    policy = Peft(Config.of(peft.LoHaConfig(r=2, target_modules=["qkv", "fc1"])))
    model = lilt.DualEncoder.build(tiny_vision, tiny_text, "frozen", vision_policy=policy.spec)
    assert model.config.vision_policy == "peft(LOHA(r=2,target_modules=fc1|qkv))"
    assert sum(row.values for row in model.report() if row.rule == "peft") == policy.plan(tiny("vit")).trained


def test_peft_says_what_it_has_to_say_once() -> None:
    tower = tiny("gpt2")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        joint = planned("peft(LORA(target_modules=c_attn))", tower)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(joint, tower)
