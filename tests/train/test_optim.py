"""Which tensor gets which learning rate and decay, and how the rate moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lilt.build import build_model
from lilt.config import ModelConfig
from lilt.model import TwoTower
from lilt.policies import policies
from lilt.train.optim import make_optimizer, make_schedule, parameter_groups


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
