"""Every policy on every tower family: what is promised about all of them at once."""

from __future__ import annotations

import copy

import pytest
import torch

from lilt.policies import apply, parse_policy
from tests.policies.conformance import PAIRS, REFUSED, TRAINING, dead_by_nature, planned, run_backward, trained, tuned
from tests.towers.families import CAPTIONS, FAMILIES, SIDES, batch, tiny

every_pair = pytest.mark.parametrize(("spec", "family"), PAIRS)
every_training_pair = pytest.mark.parametrize(("spec", "family"), TRAINING)
every_text_pair = pytest.mark.parametrize(("spec", "family"), [p for p in TRAINING if SIDES[p[1]] == "text"])


def snapshot(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tower.state_dict().items()}


@every_pair
def test_a_plan_changes_nothing_and_applying_it_trains_exactly_what_it_says(spec: str, family: str) -> None:
    tower = tiny(family)
    before, modules = snapshot(tower), [name for name, _ in tower.named_modules()]
    joint = planned(spec, tower)
    assert [name for name, _ in tower.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert all(p.requires_grad for p in tower.parameters())

    apply(joint, tower)
    assert tower.fates is not None
    assert set(trained(tower)) == set(tower.fates)
    assert sum(p.numel() for p in trained(tower).values()) == joint.trained
    assert all(p.dtype == torch.float32 for p in trained(tower).values())
    with pytest.raises(ValueError, match="already has a policy"):
        apply(joint, tower)


@every_pair
def test_the_outputs_at_the_start_are_the_pretrained_ones(spec: str, family: str) -> None:
    assert all(part.identity_at_start for part in parse_policy(spec, SIDES[family]))
    tower = tiny(family)
    inputs = batch(tower)
    with torch.no_grad():
        base = tower(inputs)
        torch.testing.assert_close(tuned(spec, tower, alive=False)(inputs), base, rtol=0, atol=1e-6)


@every_training_pair
def test_every_trained_tensor_gets_a_gradient_and_only_trained_tensors_change(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    before = snapshot(tower)
    run_backward(tower)
    alive = {name for name, p in trained(tower).items() if p.grad is not None and p.grad.abs().max() > 1e-7}
    exempt = set(dead_by_nature(tower))
    assert set(trained(tower)) - alive <= exempt

    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.step()
        run_backward(tower)
    moved = {n.removeprefix("body.") for n, t in tower.state_dict().items() if not torch.equal(t, before[n])}
    assert set(trained(tower)) - exempt <= moved <= set(trained(tower))


@every_training_pair
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


@every_training_pair
def test_bf16_autocast_gives_nearly_the_same_output_and_finite_gradients(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    with torch.no_grad():
        exact = tower(batch(tower))
    with torch.autocast("cpu", torch.bfloat16):
        out = run_backward(tower)
    assert torch.nn.functional.cosine_similarity(out.float(), exact).min() > 0.99
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(tower).values())
    assert all(p.grad is None for p in tower.parameters() if not p.requires_grad)


def switch_on_checkpointing(tower: torch.nn.Module) -> bool:
    """Recompute blocks in backward by the library's own switch, where there is one."""
    body = tower.body
    if hasattr(body, "gradient_checkpointing_enable"):
        body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return True
    if hasattr(body, "set_grad_checkpointing"):
        body.set_grad_checkpointing(True)
        return True
    return False


@every_training_pair
def test_gradient_checkpointing_gives_the_same_gradients(spec: str, family: str) -> None:
    plain = tuned(spec, tiny(family))
    saving = tuned(spec, tiny(family))
    if not switch_on_checkpointing(saving):
        pytest.skip("the family has no switch")
    for tower in (plain, saving):
        tower.train()  # transformers recomputes in train mode only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # the dropout of both
            run_backward(tower)
    for (name, a), b in zip(trained(plain).items(), trained(saving).values(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


@every_text_pair
def test_padding_leaks_nowhere(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    for pool in ("own", "token", "mean") if tower.pool == "own" else ("cls", "token", "mean"):
        tower.pool = pool
        alone = [tower(tower.contract.pad(tower.contract.encode([c])[0])) for c in CAPTIONS]
        torch.testing.assert_close(tower(batch(tower)), torch.cat(alone), rtol=0, atol=1e-5)
        if family.startswith("open_clip"):
            break  # its other pools need another tower


@pytest.mark.parametrize(("spec", "family"), [(s, f) for s, families in REFUSED.items() for f in families])
def test_what_a_pair_cannot_do_is_refused_by_naming_what_the_tower_has(spec: str, family: str) -> None:
    tower = tiny(family)
    with pytest.raises(ValueError, match=r"has no .*; it has \d+ blocks with|has \d+ blocks; give"):
        planned(spec, tower)
    assert all(p.requires_grad for p in tower.parameters())


def test_the_table_of_refusals_is_small_and_names_known_families() -> None:
    assert {f for families in REFUSED.values() for f in families} <= set(FAMILIES)
    assert sum(map(len, REFUSED.values())) == 0
