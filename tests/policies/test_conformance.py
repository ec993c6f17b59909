"""Every policy on every tower family: what is promised about all of them at once."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from lilt.policies import apply, parse_policy
from lilt.policies.liveness import dead_by_nature
from lilt.towers import Tower
from tests.policies.conformance import (
    MECHANISMS,
    PAIRS,
    REFUSED,
    SWITCHLESS,
    TRAINING,
    planned,
    run_backward,
    trained,
    tuned,
)
from tests.towers.families import CAPTIONS, FAMILIES, SIDES, batch, tiny, tokens

every_pair = pytest.mark.parametrize(("spec", "family"), PAIRS)
every_training_pair = pytest.mark.parametrize(("spec", "family"), TRAINING)
MECHANICAL = [pair for pair in TRAINING if pair[0] in MECHANISMS]
every_mechanism = pytest.mark.parametrize(("spec", "family"), MECHANICAL)
every_text_mechanism = pytest.mark.parametrize(("spec", "family"), [p for p in MECHANICAL if SIDES[p[1]] == "text"])


def snapshot(tower: Tower) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state(tower)}


def state(tower: Tower) -> list[tuple[str, torch.Tensor]]:
    return [*tower.body.named_parameters(), *tower.body.named_buffers()]


@every_pair
def test_a_plan_changes_nothing_and_applying_it_trains_exactly_what_it_says(spec: str, family: str) -> None:
    tower = tiny(family)
    before, modules = snapshot(tower), [name for name, _ in tower.named_modules()]
    joint = planned(spec, tower)
    assert [name for name, _ in tower.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(tower))
    assert all(p.requires_grad for p in tower.parameters())

    apply(joint, tower)
    assert tower.fates is not None
    assert set(trained(tower)) == set(tower.fates)
    assert sum(p.numel() for p in trained(tower).values()) == joint.trained
    assert all(p.dtype == torch.float32 for p in trained(tower).values())
    with pytest.raises(ValueError, match="already has a policy"):
        apply(joint, tower)


@every_pair
def test_the_outputs_at_the_start_are_the_pretrained_ones_where_declared(spec: str, family: str) -> None:
    tower = tiny(family)
    inputs = batch(tower)
    with torch.no_grad():
        base = tower(inputs)
        out = tuned(spec, tower, alive=False)(inputs)
    if all(part.identity_at_start for part in parse_policy(spec, SIDES[family])):
        torch.testing.assert_close(out, base, rtol=0, atol=1e-6)
    else:
        assert not torch.equal(out, base)


@every_training_pair
def test_every_trained_tensor_gets_a_gradient_and_only_trained_tensors_change(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    before = snapshot(tower)
    run_backward(tower)
    alive = {name for name, p in trained(tower).items() if p.grad is not None and p.grad.abs().max() > 1e-7}
    exempt = dead_by_nature(tower)
    assert set(trained(tower)) - alive <= exempt

    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.step()
        run_backward(tower)
    moved = {name for name, tensor in state(tower) if not torch.equal(tensor, before[name])}
    assert set(trained(tower)) - exempt <= moved <= set(trained(tower))


@every_mechanism
def test_a_deep_copy_is_its_own_tower(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    inputs = batch(tower)
    twin = copy.deepcopy(tower, {id(tower.contract): tower.contract})
    with torch.no_grad():
        base = tower(inputs)
        assert torch.equal(twin(inputs), base)
        for tensor in trained(twin).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.5)
        assert torch.equal(tower(inputs), base)
        assert not torch.allclose(twin(inputs), base)


@every_mechanism
def test_bf16_autocast_gives_nearly_the_same_output_and_finite_gradients(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    with torch.no_grad():
        exact = tower(batch(tower))
    with torch.autocast("cpu", torch.bfloat16):
        out = run_backward(tower)
    assert torch.nn.functional.cosine_similarity(out.float(), exact).min() > 0.99
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(tower).values())
    assert all(p.grad is None for p in tower.parameters() if not p.requires_grad)


def switch_on_checkpointing(tower: Tower) -> None:
    """Recompute blocks in backward by the library's own switch; transformers needs train mode for it."""
    body = tower.body
    if isinstance(body, PreTrainedModel):
        switch = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        switch({"use_reentrant": False})
    else:
        body.set_grad_checkpointing(True)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SWITCHLESS])
def test_the_switch_of_each_library_makes_blocks_run_twice(family: str) -> None:
    tower = tiny(family).train()
    switch_on_checkpointing(tower)
    calls: list[int] = []
    # inside the block, since transformers keeps a block's own hooks out of the second run; and before, not after,
    # since that run stops as soon as the last tensor that backward needs is there
    inner = [leaf for leaf in tower.anatomy.leaves if leaf.block == 0 and leaf.role in ("mlp", "conv")]
    inner[0].module.register_forward_pre_hook(lambda *_: calls.append(1))
    run_backward(tower)
    assert len(calls) == 2


@pytest.mark.parametrize(("spec", "family"), [pair for pair in MECHANICAL if pair[1] not in SWITCHLESS])
def test_gradient_checkpointing_gives_the_same_gradients(spec: str, family: str) -> None:
    plain = tuned(spec, tiny(family)).train()
    saving = tuned(spec, tiny(family)).train()
    switch_on_checkpointing(saving)
    for tower in (plain, saving):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # the dropout of both
            run_backward(tower)
    for a, b in zip(trained(plain).values(), trained(saving).values(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


@every_text_mechanism
def test_padding_leaks_nowhere(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    for pool in ("own", "token", "mean") if tower.pool == "own" else ("cls", "token", "mean"):
        tower.pool = pool
        alone = [tower(tokens(tower, caption)) for caption in CAPTIONS]
        torch.testing.assert_close(tower(batch(tower)), torch.cat(alone), rtol=0, atol=1e-5)
        if family.startswith("open_clip"):
            break  # its other pools need another tower


@pytest.mark.parametrize(("spec", "family"), [(s, f) for s, families in REFUSED.items() for f in families])
def test_what_a_pair_cannot_do_is_refused_by_naming_what_the_tower_has(spec: str, family: str) -> None:
    tower = tiny(family)
    with pytest.raises(ValueError, match=r"(has no .*; it has|has) \d+ blocks"):
        planned(spec, tower)
    assert all(p.requires_grad for p in tower.parameters())


def test_the_table_of_refusals_is_small_and_names_known_families() -> None:
    assert {f for families in REFUSED.values() for f in families} <= set(FAMILIES)
    assert sum(map(len, REFUSED.values())) == 60
