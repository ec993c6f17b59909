"""LoRA and DoRA equal the dense update written by hand, on every way in which libraries store and read weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lilt.policies.edits import Attach, Reparametrize
from tests.policies.conformance import planned, tuned
from tests.policies.updates import KINDS, alive, children, edits_of, update
from tests.towers.families import batch, tiny

CASES = [
    ("vit", "all"), ("vit", "q|v"), ("vit", "k"), ("vit", "embed"), ("deit3", "attention"), ("dinov3", "all"),
    ("eva02", "q|v"), ("eva02_base", "all"), ("beit", "qkv|out"), ("swin", "all|embed"), ("swinv2", "all"),
    ("swinv2", "q|v"), ("own_vision", "all|embed"), ("own_vision", "q|v"), ("open_clip_vision", "all|embed"),
    ("open_clip_text", "out"), ("own_mlp", "mlp"), ("convnext", "mlp"), ("convnext", "all|embed"), ("resnet", "conv"),
    ("resnet", "all|embed"), ("hf_vit", "out|embed"), ("bert", "all"), ("bert", "q|v"), ("distilbert", "qkv|out"),
    ("mpnet", "all"), ("modernbert", "all"), ("modernbert", "v"), ("t5", "all"), ("gpt2", "all"), ("gpt2", "q|v"),
    ("llama", "all"),
]  # fmt: skip


@KINDS
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_the_output_is_that_of_the_dense_update(family: str, targets: str, dora: str) -> None:
    r, alpha = 3, 6.0
    tower = alive(f"lora(r={r},alpha={alpha},targets={targets},dora={dora})", tiny(family))
    dense = tiny(family)
    with torch.no_grad():
        for edit in edits_of(tower):
            update(dense, edit, children(tower)[edit.path, edit.name], alpha / r)
        expected = dense(batch(dense))
        # the keys of a new ViT hardly matter: its attention is nearly uniform
        assert not torch.allclose(expected, tiny(family)(batch(dense)), atol=5e-4)
        torch.testing.assert_close(tower(batch(tower)), expected, rtol=2e-5, atol=2e-5)


def test_both_kinds_start_as_the_pretrained_tower_bit_for_bit() -> None:
    for family in ("vit", "eva02", "resnet", "gpt2"):
        base = tiny(family)(batch(tiny(family)))
        for dora in ("false", "true"):
            tower = tuned(f"lora(targets=all|embed,dora={dora})", tiny(family), alive=False)
            assert torch.equal(tower(batch(tower)), base)


@pytest.mark.parametrize(
    ("family", "target", "kind"),
    [
        ("vit", "qkv", Attach),
        ("vit", "embed", Attach),
        ("resnet", "conv", Attach),
        ("eva02", "qkv", Reparametrize),
        ("eva02", "out", Attach),
        ("beit", "qkv", Reparametrize),
        ("swinv2", "qkv", Reparametrize),
        ("dinov3", "qkv", Reparametrize),
        ("open_clip_vision", "qkv", Reparametrize),
        ("open_clip_vision", "out", Reparametrize),
        ("open_clip_vision", "mlp", Attach),
        ("bert", "all", Attach),
        ("gpt2", "all", Attach),
    ],
)
def test_a_side_branch_where_forward_is_called_and_a_parametrization_where_not(
    family: str, target: str, kind: type
) -> None:
    edits = planned(f"lora(targets={target})", tiny(family)).edits
    assert {type(edit) for edit in edits} == {kind}
    assert all(("read functionally" in edit.why) == (kind is Reparametrize) for edit in edits)


def test_a_fused_qkv_has_one_a_and_separate_maps_one_each() -> None:
    assert [e.count for e in planned("lora(r=2,blocks=0)", tiny("vit")).edits] == [2 * (32 + 96)]
    assert [e.count for e in planned("lora(r=2,targets=q|v,blocks=0)", tiny("vit")).edits] == [2 * (32 + 32)] * 2
    assert [e.count for e in planned("lora(r=2,blocks=0)", tiny("bert")).edits] == [2 * (32 + 32)] * 3


def test_counts_are_r_times_both_widths_and_with_dora_one_norm_a_row_more() -> None:
    assert planned("lora(r=2,targets=embed)", tiny("vit")).trained == 2 * (3 * 8 * 8 + 32)
    assert planned("lora(r=2,targets=conv,blocks=0)", tiny("resnet")).trained == 2 * 2 * (9 * 32 + 32)
    for family, targets in (("vit", "all|embed"), ("vit", "q|v"), ("open_clip_vision", "all"), ("resnet", "all")):
        plain, dora = (planned(f"lora(targets={targets},dora={kind})", tiny(family)) for kind in ("false", "true"))
        rows = sum(len(child.b) for child in children(tuned(f"lora(targets={targets})", tiny(family))).values())
        assert dora.trained == plain.trained + rows


def test_all_is_every_dense_weight_of_the_blocks() -> None:
    def paths(targets: str, family: str) -> set[str]:
        return {edit.path for edit in planned(f"lora(targets={targets})", tiny(family)).edits}

    for family in ("vit", "eva02", "bert", "open_clip_vision"):
        assert paths("all", family) == paths("attention|mlp", family)
    assert paths("all", "resnet") == paths("conv", "resnet")
    # ConvNeXt's depthwise filters and what lies between its stages stay
    assert paths("all", "convnext") == paths("mlp", "convnext")
    assert paths("embed", "convnext") == {"stem.0", *(f"stages.{i}.downsample.1" for i in (1, 2, 3))}


def test_depthwise_convolutions_are_left_out_and_the_error_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"no weights for targets=conv \(convolutions in groups are left out\); it has"
    ):
        planned("lora(targets=conv)", tiny("convnext"))


def test_rank_per_role_and_depth_by_composition() -> None:
    spec = "lora(r=2)+lora(r=5,targets=mlp,blocks=last:1)+lora(r=7,targets=mlp,blocks=:-1)"
    tower = tuned(spec, tiny("vit"))
    ranks = {path: len(child.a) for (path, _), child in children(tower).items()}
    assert ranks == {
        **{f"blocks.{i}.attn.qkv": 2 for i in (0, 1)},
        **{f"blocks.1.mlp.fc{i}": 5 for i in (1, 2)},
        **{f"blocks.0.mlp.fc{i}": 7 for i in (1, 2)},
    }
    with pytest.raises(ValueError, match=r"lora and lora both want blocks\.1\.attn\.qkv\.weight"):
        planned("lora(r=2)+lora(r=8,blocks=last:1)", tiny("vit"))
    with pytest.raises(ValueError, match=r"both want layers\.1\.self_attn\.in_proj_weight"):
        planned("lora(dora=true)+lora(targets=v,blocks=1)", tiny("own_vision"))


def test_the_weight_read_functionally_stays_under_its_name_and_frozen() -> None:
    for spec in ("lora", "lora(dora=true)"):
        tower = alive(spec, tiny("eva02"))
        qkv = tower.body.blocks[0].attn.qkv
        assert torch.equal(qkv.parametrizations.weight.original, tiny("eva02").body.blocks[0].attn.qkv.weight)
        assert not qkv.parametrizations.weight.original.requires_grad
        assert not torch.equal(qkv.weight, qkv.parametrizations.weight.original)


def test_alpha_over_r_scales_the_update() -> None:
    x = torch.randn(2, 5, 32)
    outputs = []
    for spec in ("lora(r=2,alpha=2)", "lora(r=2,alpha=6)"):
        layer = tuned(spec, tiny("vit")).body.blocks[0].attn.qkv
        outputs.append(layer(x) - nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(3 * outputs[0], outputs[1])


def test_an_adapter_on_the_same_layer_reads_what_the_update_gave_in_both_orders() -> None:
    orders = ("adapter+lora(targets=attention)", "lora(targets=attention)+adapter")
    first, second = (tuned(spec, tiny("vit")) for spec in orders)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(batch(first)), second(batch(second)), rtol=0, atol=0)
