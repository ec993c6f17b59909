"""LoRA equals the dense update written by hand, on every way in which libraries store and read weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.towers import Tower
from tests.policies.conformance import planned, tuned
from tests.towers.families import batch, tiny

CASES = [
    ("vit", "all"), ("vit", "q|v"), ("vit", "k"), ("deit3", "attention"), ("dinov3", "all"), ("eva02", "q|v"),
    ("eva02_base", "all"), ("beit", "qkv|out"), ("swin", "all"), ("swinv2", "all"), ("swinv2", "q|v"),
    ("own_vision", "all"), ("own_vision", "q|v"), ("open_clip_vision", "all"), ("open_clip_text", "out"),
    ("own_mlp", "mlp"), ("convnext", "mlp"), ("bert", "all"), ("bert", "q|v"), ("distilbert", "qkv|out"),
    ("mpnet", "all"), ("modernbert", "all"), ("modernbert", "v"), ("t5", "all"), ("gpt2", "all"), ("gpt2", "q|v"),
    ("llama", "all"),
]  # fmt: skip


def factors(tower: Tower, edit: Edit) -> tuple[str, Tensor, Tensor]:
    """Return the weight that an edit adds to, and its A and B."""
    module = tower.body.get_submodule(edit.path)
    if isinstance(edit, Attach):
        child: nn.Module = getattr(module, edit.name)
        return f"{edit.path}.weight", child.a, child.b  # type: ignore[return-value]
    assert isinstance(edit, Reparametrize)
    chain = module.parametrizations[edit.tensor]  # type: ignore[index, union-attr]
    position = len([e for e in planned_before(tower, edit) if e.path == edit.path])
    return f"{edit.path}.{edit.tensor}", chain[position].a, chain[position].b


def planned_before(tower: Tower, edit: Edit) -> list[Edit]:
    edits = list(dict.fromkeys((tower.fates or {}).values()))
    return edits[: edits.index(edit)]


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_the_output_is_that_of_the_dense_update(family: str, targets: str) -> None:
    r, alpha = 3, 6.0
    tower = tuned(f"lora(r={r},alpha={alpha},targets={targets})", tiny(family))
    dense = tiny(family)
    with torch.no_grad():
        for edit in planned(f"lora(r={r},alpha={alpha},targets={targets})", tiny(family)).edits:
            assert isinstance(edit, (Attach, Reparametrize))
            path, a, b = factors(tower, next(e for e in (tower.fates or {}).values() if same(e, edit)))
            weight = dense.body.get_parameter(path)
            rows = weight.T if type(dense.body.get_submodule(edit.path)).__name__ == "Conv1D" else weight
            third = len(rows) // 3
            start = {"lora_q": 0, "lora_k": third, "lora_v": 2 * third}.get(edit.name, 0)
            rows[start : start + len(b)] += (alpha / r) * b @ a
        expected = dense(batch(dense))
        assert not torch.allclose(expected, tiny(family)(batch(dense)), atol=1e-3)
        torch.testing.assert_close(tower(batch(tower)), expected, rtol=1e-4, atol=1e-4)


def same(one: Edit, other: Edit) -> bool:
    return (one.path, getattr(one, "name", "")) == (other.path, getattr(other, "name", ""))


@pytest.mark.parametrize(
    ("family", "target", "kind"),
    [
        ("vit", "qkv", Attach),
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


def test_the_weight_read_functionally_stays_under_its_name_and_frozen() -> None:
    tower = tuned("lora", tiny("eva02"))
    qkv = tower.body.blocks[0].attn.qkv
    torch.testing.assert_close(qkv.parametrizations.weight.original, tiny("eva02").body.blocks[0].attn.qkv.weight)
    assert not qkv.parametrizations.weight.original.requires_grad
    assert not torch.equal(qkv.weight, qkv.parametrizations.weight.original)


def test_alpha_over_r_scales_the_update() -> None:
    x = torch.randn(2, 5, 32)
    outputs = []
    for spec in ("lora(r=2,alpha=2)", "lora(r=2,alpha=6)"):
        layer = tuned(spec, tiny("vit")).body.blocks[0].attn.qkv
        outputs.append(layer(x) - nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(3 * outputs[0], outputs[1])
