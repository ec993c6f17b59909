"""Blocks that are computed twice or compiled: the same gradients, the same names, less memory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.backends.registry import _COMPILER_FNS
from torch.autograd.graph import saved_tensors_hooks

from lilt import checkpoint
from lilt.build import build_model, build_pairs, build_splits
from lilt.config import TrainConfig
from lilt.data import Batch
from lilt.model import TwoTower
from lilt.towers import Inputs
from lilt.towers.front import Front
from lilt.train.blocks import check_backend, checkpoint_blocks, compile_blocks
from lilt.train.learner import Learner
from lilt.train.reuse import find_fronts
from lilt.train.step import Objective, backward
from tests.train.conftest import Run

# what is inside a block, on it, around it, and in front of it
POLICIES = ("full", "lora(r=2,targets=all)", "adapter(reduction=4)+layernorm", "deep_adapter", "prompt(n=2)", "last(1)")


@pytest.fixture
def config(settings: dict[str, Any], pictures: Any) -> TrainConfig:
    """Dropout in both towers."""
    vision = f"{settings['vision']}?proj_drop_rate=0.3"
    data = str(pictures / "manifest.jsonl")
    return TrainConfig(**{**settings, "vision": vision}, data=data, augment="none")


def parts(config: TrainConfig, policy: str) -> tuple[TwoTower, Batch]:
    model = build_model(TrainConfig(**{**vars(config), "policy": policy})).train()
    dataset, collate = build_pairs(config, model, build_splits(config).train)
    return model, collate([dataset[0, i] for i in range(7)])


def gradients(
    model: TwoTower, batch: Batch, micro_batch: int | None = None, fronts: dict[str, Front] | None = None
) -> dict[str, Tensor]:
    torch.manual_seed(5)  # the dropout
    model.zero_grad()
    fronts = fronts or {}
    backward(Learner(model, None, fronts), Objective(), [batch], Accelerator(), micro_batch, None, fronts)
    return {name: p.grad.clone() for name, p in model.trained().items() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_checkpointed_blocks_is_the_same_bit_for_bit(
    config: TrainConfig, policy: str, micro_batch: int | None
) -> None:
    model, batch = parts(config, policy)
    plain = gradients(model, batch, micro_batch)
    assert set(plain) == set(model.trained())
    names = list(model.state_dict())
    checkpoint_blocks(model)
    assert list(model.state_dict()) == names
    calls: list[int] = []
    inner = [leaf for leaf in model.text.anatomy.leaves if leaf.block == 1 and leaf.role == "mlp"]
    inner[0].module.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, batch, micro_batch)
    forwards = 1 if micro_batch is None else 5  # of three pieces the last is passed once
    assert len(calls) == forwards + (1 if micro_batch is None else 3)  # each with gradients is run twice
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("stored", ["in the first pass", "before"])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("full", "prompt(n=2)")] + ["frozen"])
def test_a_block_that_a_stored_front_stands_in_for_is_not_run_again(
    config: TrainConfig, policy: str, stored: str
) -> None:
    """What a policy has hung on the last block of a frozen front is trained, and the block behind it is not run."""
    model, batch = parts(config, policy)
    fronts = find_fronts(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its stream depends on what is run
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    plain = gradients(model, batch, None)
    if stored == "before":
        inputs: dict[str, Inputs] = {"vision": batch.images, "text": batch.tokens}
        batch = replace(batch, stored={side: front.record(inputs[side]) for side, front in fronts.items()})
    checkpoint_blocks(model)
    found = gradients(model, batch, 3 if stored == "in the first pass" else None, fronts)
    for name, gradient in plain.items():
        worst = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-4)
        assert worst < 1e-3, f"{name}: {worst:.1e} of its largest entry"


def kept_bytes(model: TwoTower, batch: Batch) -> int:
    """Run a forward and count what it keeps for the way back, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(batch.images, batch.tokens)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert out.image.requires_grad
    return size


def test_checkpointed_blocks_keep_their_input_alone(config: TrainConfig) -> None:
    model, batch = parts(config, "full")
    plain = kept_bytes(model, batch)
    checkpoint_blocks(model)
    kept = kept_bytes(model, batch)
    # two blocks in each tower: what is before and behind them is kept as ever
    tokens = 7 * (17 * 32 + batch.tokens["input_ids"].shape[1] * 32) * 4
    assert kept < 0.35 * plain
    assert kept > 2 * tokens


def test_a_copy_is_a_plain_one_and_runs_by_itself(config: TrainConfig) -> None:
    model, batch = parts(config, "full")
    model.eval()
    checkpoint_blocks(model)
    twin = copy.deepcopy(model.vision.body)
    for parameter in twin.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert not twin(batch.images).any()
        assert model.vision(batch.images).any()


def test_a_run_with_checkpoints_is_the_same_run(run: Run) -> None:
    plain, saving = (
        run(name, epochs=2, policy="lora(r=2)", checkpointing=on) for name, on in (("p", False), ("c", True))
    )
    one, two = (load_file(done.folder / checkpoint.ADAPTER) for done in (plain, saving))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """The graphs that a backend named counting was given; it runs them as they are."""
    found: list[Any] = []

    def counting(graph: Any, _inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="counting")
    yield found
    del _COMPILER_FNS["counting"]
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks_give_the_same_gradient(config: TrainConfig, policy: str, graphs: list[Any]) -> None:
    model, batch = parts(config, policy)
    model.eval()
    plain = gradients(model, batch)
    names = list(model.state_dict())
    compile_blocks(model, "counting")
    assert list(model.state_dict()) == names
    compiled = gradients(model, batch)
    assert graphs
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    seen = len(graphs)
    gradients(model, batch)
    assert len(graphs) == seen  # and are compiled once


def test_a_compiled_run_has_the_names_and_the_values_of_a_plain_one(run: Run, graphs: list[Any]) -> None:
    options: dict[str, Any] = {"epochs": 2, "policy": "last(1)", "micro_batch": 4, "text_policy": "frozen"}
    options |= {"augment": "none", "reuse": "memory"}  # the fronts are recorded and put back
    plain = run("plain", **options)
    compiled = run("compiled", compile=True, compile_backend="counting", checkpointing=True, **options)
    one, two = (load_file(done.folder / checkpoint.ADAPTER) for done in (plain, compiled))
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert 0 < len(graphs) < 20


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler on CPU")
def test_inductor_compiles_them_too(config: TrainConfig) -> None:
    torch._dynamo.reset()
    model, batch = parts(replace(config, vision=f"{config.vision}&layers=1"), "layernorm")
    check_backend("inductor", torch.device("cpu"))
    with torch.no_grad():  # one block and one way: a C++ compiler takes its time
        plain = model.eval().encode_image(batch.images)
        compile_blocks(model, "inductor")
        torch.testing.assert_close(model.encode_image(batch.images), plain, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile_backend='inducter'; expected one of .*inductor.*; leave it out"):
        check_backend("inducter", torch.device("cpu"))


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(
        ValueError, match=r"--compile found no C\+\+ compiler .*; expected g\+\+ or clang\+\+.*: install"
    ):
        check_backend("inductor", torch.device("cpu"))
