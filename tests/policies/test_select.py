"""Policies that open what a tower already has."""

from __future__ import annotations

import pytest
import torch

from tests.policies.conformance import planned, trained, tuned
from tests.towers.families import tiny


def opened(spec: str, family: str) -> set[str]:
    return set(trained(tuned(spec, tiny(family))))


def test_frozen_trains_nothing_and_full_everything() -> None:
    assert opened("frozen", "swin") == set()
    assert opened("full", "swin") == {name for name, _ in tiny("swin").body.named_parameters()}


def test_full_counts_tied_embeddings_once() -> None:
    tower = tiny("t5")
    assert planned("full", tower).trained == sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize(
    ("family", "some"),
    [
        ("eva02", {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "patch_embed.proj.bias"}),
        ("beit", {"blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.1.mlp.fc1.bias"}),
        ("swinv2", {"layers.0.blocks.0.attn.q_bias", "layers.0.blocks.0.attn.v_bias"}),
        ("open_clip_text", {"transformer.resblocks.0.attn.in_proj_bias", "transformer.resblocks.0.attn.out_proj.bias"}),
        ("own_vision", {"layers.0.self_attn.in_proj_bias", "embed.project.bias"}),
        ("bert", {"encoder.layer.0.attention.self.key.bias", "embeddings.LayerNorm.bias"}),
    ],
)
def test_bitfit_finds_biases_under_every_name_and_no_tables(family: str, some: set[str]) -> None:
    found = opened("bitfit", family)
    assert some <= found
    assert all(name.endswith("bias") for name in found)
    sizes = dict(tiny(family).body.named_parameters())
    assert found == {name for name, p in sizes.items() if p.ndim == 1 and name.endswith("bias")}


def test_layernorm_finds_norms_by_class_under_every_name() -> None:
    assert opened("layernorm", "llama") == {
        *(f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")),
        "norm.weight",
    }
    assert "bn1.bias" in opened("layernorm", "resnet")
    assert "encoder.block.0.layer.1.layer_norm.weight" in opened("layernorm", "t5")


def test_attention_takes_projections_biases_and_tables() -> None:
    assert {n.removeprefix("blocks.0.attn.") for n in opened("attention", "beit") if n.startswith("blocks.0")} == {
        "q_bias", "v_bias", "relative_position_bias_table", "qkv.weight", "proj.weight", "proj.bias",
    }  # fmt: skip


def test_mlp_takes_the_dense_layers_outside_the_attention() -> None:
    assert opened("mlp(blocks=0)", "llama") == {
        f"layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert opened("mlp", "own_mlp") == {"2.weight", "2.bias", "4.weight", "4.bias"}


def test_last_takes_the_last_blocks_and_what_runs_after_them() -> None:
    assert {n.split(".")[0] for n in opened("last(1)", "siglip")} == {"blocks", "norm", "attn_pool"}
    names = opened("last(1)", "swin")
    assert all(name.startswith(("layers.1.blocks.1", "norm")) for name in names)
    assert "norm.weight" in names
    assert "attn_pool.latent" in opened("last(2)", "siglip")


@pytest.mark.parametrize("n", [0, 3])
def test_last_beyond_the_depth_is_an_error(n: int) -> None:
    with pytest.raises(ValueError, match=rf"last\({n}\): the vision tower .* has 2 blocks; give 1 to 2"):
        planned(f"last({n})", tiny("vit"))


def test_first_takes_the_first_blocks_and_what_runs_before_them() -> None:
    names = opened("first(1)", "vit")
    assert {n.split(".")[0] for n in names} == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    assert all(n.startswith("blocks.0.") for n in names if n.startswith("blocks"))
    assert "embeddings.word_embeddings.weight" in opened("first(1)", "bert")


def test_first_and_last_share_out_a_plain_tower() -> None:
    first, last = opened("first(1)", "vit"), opened("last(1)", "vit")
    assert not first & last
    assert first | last == opened("full", "vit")


def test_first_beyond_the_depth_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"first\(3\): the vision tower .* has 2 blocks; give 1 to 2"):
        planned("first(3)", tiny("vit"))


def test_blocks_takes_whole_blocks_and_nothing_else() -> None:
    assert opened("blocks(1)", "vit") == {n for n in opened("full", "vit") if n.startswith("blocks.1.")}
    assert opened("blocks(all)", "bert") == {n for n in opened("full", "bert") if n.startswith("encoder.layer.")}
    with pytest.raises(ValueError, match="has no blocks; it has 2 blocks"):
        planned("blocks(5:7)", tiny("vit"))


def test_except_leaves_out_a_role_and_only_in_the_blocks_named() -> None:
    everything = opened("full", "vit")
    assert everything - opened("except(embedding)", "vit") == {n for n in everything if not n.startswith(("bl", "nor"))}
    assert everything - opened("except(norm,blocks=0)", "vit") == {
        n for n in everything if n.startswith("blocks.0.norm")
    }
    assert everything - opened("except(all,blocks=first:1)", "vit") == opened("blocks(0)", "vit")


def test_except_refuses_an_unknown_role_and_leaving_out_everything() -> None:
    with pytest.raises(ValueError, match=r"unknown role 'norms'.*Did you mean 'norm'\?"):
        planned("except(norms)", tiny("vit"))
    with pytest.raises(ValueError, match="has no parameters besides all"):
        planned("except(all)", tiny("vit"))


def test_random_is_drawn_from_its_seed_alone_and_keeps_to_its_share() -> None:
    chosen = opened("random(0.3)", "vit")
    torch.manual_seed(99)
    assert chosen == opened("random(0.3)", "vit")
    assert chosen != opened("random(0.3,seed=1)", "vit")
    total = sum(p.numel() for p in tiny("vit").body.parameters())
    assert 0.2 * total < planned("random(0.3)", tiny("vit")).trained <= 0.3 * total
    assert opened("random(1)", "vit") == opened("full", "vit")


def test_random_refuses_what_is_no_share_or_too_small_for_any_tensor() -> None:
    with pytest.raises(ValueError, match=r"share=0\.0; expected a part"):
        planned("random(0)", tiny("vit"))
    with pytest.raises(ValueError, match="no tensor within a share of 1e-06"):
        planned("random(1e-6)", tiny("vit"))
