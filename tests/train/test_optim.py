"""Which tensor gets which learning rate and decay, and how the rate moves."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lilt.build import build_model
from lilt.config import ModelConfig
from lilt.model import TwoTower
from lilt.policies import policies
from lilt.train.optim import make_optimizer, make_schedule, parameter_groups
from lilt.train.state import find_state
from tests.train.conftest import Run


def facts(model: TwoTower, **options: Any) -> dict[str, tuple[float, float]]:
    """Return (lr, decay) of every trained parameter by name."""
    groups = parameter_groups(model, **({"lr": None, "head_lr": 5e-4, "weight_decay": 0.1} | options))
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(by_id) == sum(len(group["params"]) for group in groups)
    return {name: by_id[id(p)] for name, p in model.trained().items()}


@pytest.fixture
def model(settings: dict[str, Any]) -> TwoTower:
    return build_model(ModelConfig(**settings, vision_policy="lora(r=2)+layernorm", text_policy="last(1)"))


def test_only_matrices_are_decayed(model: TwoTower) -> None:
    decay = {name: wd for name, (_, wd) in facts(model).items()}
    assert decay == {name: 0.1 if p.ndim > 1 else 0.0 for name, p in model.trained().items()}
    assert decay["scale.log"] == decay["projection.vision.bias"] == 0
    assert decay["projection.vision.weight"] == 0.1
    assert 0 < sum(wd > 0 for wd in decay.values()) < len(decay)


def test_each_policy_brings_its_own_rate(model: TwoTower) -> None:
    for name, (lr, _) in facts(model).items():
        if name.startswith(("projection", "scale")):
            assert lr == 5e-4
        elif name.startswith("text"):
            assert lr == policies["last"].lr
        else:
            assert lr == policies["layernorm" if "norm" in name else "lora"].lr


def test_a_given_rate_is_that_of_all_tower_tensors(model: TwoTower) -> None:
    for name, (lr, _) in facts(model, lr=0.25).items():
        assert lr == (5e-4 if name.startswith(("projection", "scale")) else 0.25)


def test_the_optimizer_has_the_second_moment_asked_for(model: TwoTower) -> None:
    optimizer = make_optimizer(model, None, 1e-3, 0.1, 0.98)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(warmup: int) -> None:
    peak, floor, steps = 2.0, 0.1, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make_schedule(optimizer, steps, warmup, floor)
    seen = []
    for _ in range(steps + 3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step in range(warmup):
        assert seen[step] == pytest.approx(peak * (floor + (1 - floor) * step / warmup))
    for step in range(warmup, steps):
        curve = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert seen[step] == pytest.approx(peak * (floor + (1 - floor) * curve))
    assert seen[warmup] == peak
    assert seen[steps:] == pytest.approx([peak * floor] * 3)


def test_without_its_package_the_8_bit_optimizer_says_what_to_install(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    message = r"adamw8bit needs bitsandbytes, which is not installed; expected .*; pip install 'lilt\[bitsandbytes\]'"
    with pytest.raises(ValueError, match=message):
        make_optimizer(model, None, 1e-3, 0.0, 0.99, kind="adamw8bit")


def test_the_8_bit_optimizer_steps_almost_as_the_plain_one(run: Run) -> None:
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimizer is an extra")
    plain, small = (run(kind, optimizer=kind, epochs=2, policy="full") for kind in ("adamw", "adamw8bit"))
    state, _ = find_state(small.folder)
    saved, _ = tree_flatten(torch.load(state / "optimizer.bin", weights_only=True)["state"])
    assert torch.uint8 in {value.dtype for value in saved if isinstance(value, Tensor)}
    moved = build_model(plain.config).trained()
    for name, parameter in plain.model.trained().items():
        step, other = parameter - moved[name], small.model.trained()[name] - moved[name]
        if parameter.numel() >= 1024 and "key" not in name:
            assert torch.cosine_similarity(step.flatten(), other.flatten(), dim=0) > 0.9, name


def test_tensors_that_are_spread_have_no_8_bit_moments(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilt.distributed.is_spread", lambda tensor: True)
    message = r"adamw8bit came with FSDP2, .*; expected one of the two; leave --optimizer out"
    with pytest.raises(ValueError, match=message):
        make_optimizer(model, None, 1e-3, 0.0, 0.99, kind="adamw8bit")
