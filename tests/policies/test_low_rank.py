"""The modules of low-rank updates agree with each other, with peft, and with what they fold into."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lilt.policies import apply
from lilt.policies.edits import Attach, Reparametrize
from lilt.policies.low_rank import LowRank, Magnitudes
from lilt.towers import Tower
from tests.policies.conformance import moved_in_proportion, planned, run_backward, trained, tuned
from tests.policies.updates import KINDS, alive, children, edits_of, uncalled
from tests.towers.families import batch, tiny


@KINDS
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("vit", "all|embed"),
        ("vit", "q|v"),
        ("swin", "q|v"),
        ("resnet", "all|embed"),
        ("convnext", "all|embed"),
        ("bert", "all"),
        ("gpt2", "q|v|out|mlp"),
    ],
)
def test_side_branch_and_parametrization_agree_in_value_and_gradient(family: str, targets: str, dora: str) -> None:
    spec = f"lora(r=3,targets={targets},dora={dora})"
    beside, inside = alive(spec, tiny(family)).double(), alive(spec, uncalled(tiny(family))).double()
    assert {type(edit) for edit in edits_of(beside)} == {Attach}
    assert {type(edit) for edit in edits_of(inside)} == {Reparametrize}
    inputs = batch(beside) if beside.side == "text" else batch(beside).double()
    torch.testing.assert_close(run_backward(beside, inputs), run_backward(inside, inputs), rtol=1e-10, atol=1e-10)
    found = children(inside)
    for place, child in children(beside).items():
        for name, parameter in child.named_parameters():
            other = found[place].get_parameter(name)
            assert torch.equal(parameter, other)
            assert parameter.grad is not None and parameter.grad.any()
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-9)


@KINDS
@pytest.mark.parametrize("family", ["vit", "eva02", "resnet", "gpt2"])
def test_it_runs_on_the_meta_device_for_budgets(family: str, dora: str) -> None:
    tower = tiny(family).to("meta")
    inputs = batch(tower)
    inputs = {k: v.to("meta") for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to("meta")
    with torch.device("meta"):
        apply(planned(f"lora(targets=all|embed,dora={dora})", tower), tower)
    tower(inputs).sum().backward()
    assert all(p.grad is not None for p in trained(tower).values())


@KINDS
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("vit", "q|v|mlp"),
        ("eva02", "q|v|out"),
        ("open_clip_vision", "all|embed"),
        ("resnet", "all"),
        ("bert", "all"),
        ("gpt2", "all"),
    ],
)
class TestAfterTraining:
    """What is promised about an update that is there."""

    def test_folded_it_gives_the_same_outputs_from_a_plain_tower(self, family: str, targets: str, dora: str) -> None:
        tower, base = alive(f"lora(targets={targets},dora={dora})", tiny(family)), tiny(family)
        inputs = batch(tower)
        with torch.no_grad():
            tuned_output = tower(inputs)
            for edit in edits_of(tower):
                edit.fold(tower.body)
            torch.testing.assert_close(tower(inputs), tuned_output, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(tuned_output, base(inputs), atol=1e-3)
        assert list(tower.body.state_dict()) == list(base.body.state_dict())
        assert [type(m) for m in tower.body.modules()] == [type(m) for m in base.body.modules()]

    def test_switched_off_it_is_the_pretrained_tower_bit_for_bit(self, family: str, targets: str, dora: str) -> None:
        tower = alive(f"lora(targets={targets},dora={dora})", tiny(family))
        with torch.no_grad():
            tuned_output = tower(batch(tower))
            for edit in edits_of(tower):
                edit.switch(tower.body, on=False)
            assert torch.equal(tower(batch(tower)), tiny(family)(batch(tower)))
            for edit in edits_of(tower):
                edit.switch(tower.body, on=True)
            assert torch.equal(tower(batch(tower)), tuned_output)

    def test_rescaled_its_weights_lie_on_the_line_to_the_tuned_ones(self, family: str, targets: str, dora: str) -> None:
        spec = f"lora(targets={targets},dora={dora})"
        weights = {(edit.path, edit.claim) for edit in edits_of(alive(spec, tiny(family)))}
        assert moved_in_proportion(lambda: alive(spec, tiny(family)), tiny(family)) == len(weights)


def copy_from(theirs: nn.Module, child: LowRank) -> list[tuple[Tensor, nn.Parameter]]:
    """Copy peft's tensors of one layer into ours; return the pairs."""
    pairs = [
        (theirs.lora_A["default"].weight, child.a),  # type: ignore[index, union-attr]
        (theirs.lora_B["default"].weight, child.b),  # type: ignore[index, union-attr]
    ]
    if isinstance(child, Magnitudes):
        magnitude = theirs.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
        torch.testing.assert_close(magnitude.flatten(), child.m)  # both start as the norms
        magnitude.data.mul_(torch.linspace(0.7, 1.3, magnitude.numel()).view_as(magnitude))
        pairs.append((magnitude, child.m))
    for source, target in pairs:
        target.data.copy_(source.data.view_as(target))
    return pairs  # type: ignore[return-value]


@KINDS
@pytest.mark.parametrize(
    ("family", "targets", "pattern"),
    [
        ("vit", "all|embed", r".*(qkv|attn\.proj|fc1|fc2|patch_embed\.proj)"),
        ("bert", "q|v|mlp", r".*(query|value|intermediate\.dense|\d\.output\.dense)"),
        ("resnet", "conv", r"layer.*(conv\d|downsample\.1)"),
        ("gpt2", "qkv|out", r".*attn\.c_(attn|proj)"),
    ],
)
def test_peft_gives_the_same_outputs_and_gradients_where_it_is_right(
    family: str, targets: str, pattern: str, dora: str
) -> None:
    ours, theirs = tuned(f"lora(r=3,alpha=6,targets={targets},dora={dora})", tiny(family)), tiny(family)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=pattern, use_dora=dora == "true", fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        peft.inject_adapter_in_model(config, theirs.body)
    if dora == "true":  # peft takes the norms with its random B in them; the pretrained ones are what is meant
        reset_magnitudes(theirs)
    pairs = [
        pair
        for (path, _), child in children(ours).items()
        for pair in copy_from(theirs.body.get_submodule(path), child)
    ]
    assert {id(source) for source, _ in pairs} == {id(p) for p in theirs.parameters() if p.requires_grad}
    torch.testing.assert_close(run_backward(ours), run_backward(theirs), rtol=1e-4, atol=1e-4)
    for source, target in pairs:
        assert source.grad is not None and target.grad is not None and target.grad.any()
        torch.testing.assert_close(target.grad, source.grad.view_as(target), rtol=1e-3, atol=1e-4)


def reset_magnitudes(theirs: Tower) -> None:
    for module in theirs.body.modules():
        if hasattr(module, "lora_magnitude_vector"):
            weight = module.get_base_layer().weight
            matrix = weight.T if isinstance(module.get_base_layer(), hf.pytorch_utils.Conv1D) else weight.flatten(1)
            magnitude = module.lora_magnitude_vector["default"].weight
            magnitude.data.copy_(matrix.norm(dim=1).view_as(magnitude))


def test_the_norm_of_dora_follows_the_update_and_gets_no_gradient() -> None:
    tower = alive("lora(r=2,dora=true,blocks=0)", tiny("vit"))
    qkv = tower.body.blocks[0].attn.qkv
    a, b, m = (tensor.detach() for tensor in (qkv.lora.a, qkv.lora.b, qkv.lora.m))
    a.requires_grad_()
    norm = (qkv.weight + 8.0 * b @ a).norm(dim=1).detach()
    x = torch.randn(4, 32)
    y = (x @ (qkv.weight + 8.0 * b @ a).T) * m / norm + qkv.bias
    torch.testing.assert_close(qkv(x), y, rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(y.square().sum(), a)
    (found,) = torch.autograd.grad(qkv(x).square().sum(), qkv.lora.a)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_dora_leaves_a_row_of_zeros_alone_and_can_still_move_it() -> None:
    tower = tiny("vit")
    tower.body.blocks[0].attn.qkv.weight.data[3] = 0
    base = tower(batch(tower))
    tuned("lora(dora=true)", tower, alive=False)
    assert torch.equal(tower(batch(tower)), base)
    run_backward(tower)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(tower).values())
