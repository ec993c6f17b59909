"""Factors on activations and inside weights agree with each other, with peft, and with what they fold into."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from lilt.policies.edits import Attach, Reparametrize
from tests.policies.conformance import moved_in_proportion, run_backward
from tests.policies.factors import alive, edits_of, gains
from tests.policies.updates import uncalled
from tests.towers.families import batch, tiny


@pytest.mark.parametrize("family", ["vit", "swin", "bert", "gpt2", "convnext"])
def test_on_activations_and_in_weights_it_agrees_in_value_and_gradient(family: str) -> None:
    outside, inside = alive("ia3", tiny(family)).double(), alive("ia3", uncalled(tiny(family))).double()
    assert all(isinstance(edit, Attach) for edit in edits_of(outside))
    assert all(isinstance(edit, Reparametrize) for edit in edits_of(inside))
    assert all("read functionally" in edit.why for edit in edits_of(inside))
    inputs = batch(outside) if outside.side == "text" else batch(outside).double()
    torch.testing.assert_close(run_backward(outside, inputs), run_backward(inside, inputs), rtol=1e-10, atol=1e-10)
    found = gains(inside)
    for place, child in gains(outside).items():
        assert torch.equal(child.l, found[place].l)
        assert child.l.grad is not None and child.l.grad.any()
        torch.testing.assert_close(child.l.grad, found[place].l.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "keys_and_values", "outputs"),
    [
        ("bert", r"key|value", r"encoder\.layer\.\d\.output\.dense"),
        ("hf_vit", r"[kv]_proj", r"mlp\.fc2"),
        ("t5", r"SelfAttention\.[kv]", r"\.wo"),
        ("llama", r"[kv]_proj", r"down_proj"),
    ],
)
def test_peft_gives_the_same_outputs_and_gradients(family: str, keys_and_values: str, outputs: str) -> None:
    ours, theirs = alive("ia3", tiny(family)), tiny(family)
    config = peft.IA3Config(
        target_modules=rf".*({keys_and_values}|{outputs})", feedforward_modules=rf".*({outputs})", fan_in_fan_out=False
    )
    peft.inject_adapter_in_model(config, theirs.body)
    pairs = []
    for (path, _), child in gains(ours).items():
        source: Any = theirs.body.get_submodule(path).ia3_l["default"]  # type: ignore[index, union-attr]
        source.data.copy_(child.l.data.view_as(source))
        pairs.append((source, child.l))
    assert {id(source) for source, _ in pairs} == {id(p) for p in theirs.parameters() if p.requires_grad}
    torch.testing.assert_close(run_backward(ours), run_backward(theirs), rtol=1e-4, atol=1e-4)
    for source, target in pairs:
        assert target.grad is not None and target.grad.any()
        torch.testing.assert_close(target.grad, source.grad.view_as(target), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "swinv2", "open_clip_vision", "bert", "gpt2", "convnext"])
class TestAfterTraining:
    """What is promised about factors that are no longer one."""

    def test_folded_they_give_the_same_outputs_from_a_plain_tower(self, family: str) -> None:
        tower, base = alive("ia3", tiny(family)), tiny(family)
        inputs = batch(tower)
        with torch.no_grad():
            tuned_output = tower(inputs)
            for edit in edits_of(tower):
                edit.fold(tower.body)
            torch.testing.assert_close(tower(inputs), tuned_output, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(tuned_output, base(inputs), atol=1e-3)
        assert list(tower.body.state_dict()) == list(base.body.state_dict())
        assert [type(m) for m in tower.body.modules()] == [type(m) for m in base.body.modules()]

    def test_switched_off_it_is_the_pretrained_tower_bit_for_bit(self, family: str) -> None:
        tower = alive("ia3", tiny(family))
        with torch.no_grad():
            tuned_output = tower(batch(tower))
            for edit in edits_of(tower):
                edit.switch(tower.body, on=False)
            assert torch.equal(tower(batch(tower)), tiny(family)(batch(tower)))
            for edit in edits_of(tower):
                edit.switch(tower.body, on=True)
            assert torch.equal(tower(batch(tower)), tuned_output)

    def test_rescaled_its_weights_lie_on_the_line_to_the_tuned_ones(self, family: str) -> None:
        moved = moved_in_proportion(lambda: alive("ia3", tiny(family)), tiny(family))
        assert moved >= len(edits_of(alive("ia3", tiny(family))))
