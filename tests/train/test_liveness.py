"""Tensors that do not learn stop the training within two steps, by name; all others are left in peace."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from lilt import ImageContract, distributed
from lilt.build import build_model
from lilt.config import ModelConfig, TrainConfig
from lilt.model import TwoTower
from lilt.policies import check_alive
from lilt.policies.liveness import Gradients, read_gradients
from lilt.run import align
from lilt.train import Trainer
from lilt.train import liveness as first_steps
from lilt.train.liveness import FirstSteps
from tests.train.conftest import Run, interrupt_at

ROOT = Path(__file__).parents[2]


class Forgetful(nn.Module):
    """A tower that reads its last map in eval mode alone, or without ever letting it count."""

    def __init__(self, ever: bool):
        super().__init__()
        self.pool, self.ever = nn.AvgPool2d(8), ever
        self.read, self.last = nn.Linear(48, 8), nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.read(self.pool(images).flatten(1))
        return x if self.training else x + self.ever * self.last(x)


def forgetful() -> tuple[nn.Module, ImageContract]:
    return Forgetful(ever=True), ImageContract(32)


def dead() -> tuple[nn.Module, ImageContract]:
    return Forgetful(ever=False), ImageContract(32)


FORGETFUL, DEAD = (f"py:tests.train.test_liveness:{name}" for name in ("forgetful", "dead"))


@pytest.fixture(scope="session")
def zero_gains(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a SwinV2 that was never trained: its residual norms have weights of zero."""
    folder = tmp_path_factory.mktemp("swinv2")
    size: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=3, **size)
    save_for_hf(model, str(folder), model_args=size, safe_serialization=True)
    return f"timm:{folder}"


def watch(trainer: Trainer) -> list[Gradients]:
    """Note what the trainer reads of its gradients, and let it go on."""
    seen: list[Gradients] = []
    look = trainer.first_steps.look

    def note(optimizer: Any) -> None:
        seen.append(read_gradients(trainer.core.trained()))
        look(optimizer)

    trainer.first_steps.look = note  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("policy", ["lora(r=2)", "adapter", "deep_adapter+layernorm", "full"])
def test_zero_at_the_first_step_is_how_policies_begin(run: Run, policy: str) -> None:
    seen: list[list[Gradients]] = []
    done = run(policy=policy, epochs=1.5, eval_every=9, wish=lambda trainer: seen.append(watch(trainer)))
    assert done.outcome.finished
    partners = {n for n in done.model.trained() if n.endswith((".a", ".down.weight", ".qkv.weight")) and "body" in n}
    assert not partners & seen[0][1].zero
    if policy != "full":
        assert partners and partners <= seen[0][0].zero
    assert not any(found.missing for found in seen[0])


def test_a_tensor_that_only_eval_mode_reads_stops_the_first_step(run: Run, settings: dict[str, Any]) -> None:
    check_alive(build_model(ModelConfig(**settings | {"vision": FORGETFUL, "policy": "full"})).vision)
    message = r"first step left vision.body.last.weight, vision.body.last.bias without a gradient; expected .*Mend the"
    with pytest.raises(ValueError, match=message):
        run(vision=FORGETFUL, policy="full")


def test_a_frozen_zero_in_front_of_them_stops_the_second_step(run: Run, zero_gains: str, tmp_path: Path) -> None:
    seen: list[list[Gradients]] = []
    message = (
        r"gradient of vision.body.layers.0.blocks.0.attn.proj.lora.a, .* and \d+ more was zero in each of the first "
        r"steps; expected every trained tensor to learn: a frozen zero .*\(\+layernorm\)"
    )
    options: dict[str, Any] = {"vision": zero_gains, "epochs": 3, "wish": lambda trainer: seen.append(watch(trainer))}
    with pytest.raises(ValueError, match=message):
        run(policy="lora(targets=out|mlp,r=2)", **options)
    assert len(seen[0]) == 2
    assert run("mended", policy="lora(targets=out|mlp,r=2)+layernorm", **options).outcome.finished
    awake = [{name for name in found.zero if "vision" in name} for found in seen[1]]
    assert awake[0] > awake[1] > awake[2] == set()  # first the gains, then B, then A


def test_a_loss_without_any_slope_is_said_to_be_that(run: Run) -> None:
    with pytest.raises(
        ValueError, match=r"first steps; that is all there is to train, so the loss is flat; .*batch_size"
    ):
        run(batch_size=1)


def test_nothing_is_looked_at_after_the_second_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(given: dict[str, nn.Parameter]) -> Gradients:
        reads.append(1)
        return read_gradients(given)

    reads: list[int] = []
    monkeypatch.setattr(first_steps, "read_gradients", count)
    assert not run("parts", policy="lora(r=2)", epochs=3, wish=interrupt_at(1)).outcome.finished
    assert len(reads) == 1
    run("parts", policy="lora(r=2)", epochs=3, resume=True, wish=interrupt_at(4))
    assert len(reads) == 3  # what the first step showed is not known any more: two more
    assert run("parts", policy="lora(r=2)", epochs=3, resume=True).outcome.finished
    assert len(reads) == 3


def test_a_first_step_at_rest_does_not_count(run: Run) -> None:
    """With a floor of zero warm-up begins at a learning rate of zero, and the B of LoRA stays where it is."""
    seen: list[list[Gradients]] = []
    wish = {"wish": lambda trainer: seen.append(watch(trainer))}
    assert run(policy="lora(r=2)", epochs=3, lr_floor=0.0, warmup_steps=3, **wish).outcome.finished
    partners = {name for name in seen[0][0].zero if name.endswith(".lora.a")}
    assert partners and partners <= seen[0][1].zero and not partners & seen[0][2].zero


def test_steps_that_a_gradient_scaler_skips_do_not_count(run: Run) -> None:
    """fp16 begins like this: the scale is too high, a gradient overflows, the step is skipped, the scale is halved."""
    seen: list[list[Gradients]] = []

    def overflow(trainer: Trainer) -> None:
        scaler = GradScaler("cpu", init_scale=2.0**127)
        trainer.accelerator.scaler = scaler
        trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
        seen.append(watch(trainer))

    assert run(policy="lora(r=2)", epochs=5, clip_norm=None, wish=overflow).outcome.finished
    skipped = [found.finite for found in seen[0]].index(True)
    assert skipped > 0
    partners = {name for name in seen[0][skipped].zero if name.endswith(".lora.a")}
    assert partners and not partners & seen[0][skipped + 1].zero


def model(settings: dict[str, Any], policy: str) -> tuple[TwoTower, torch.optim.Optimizer]:
    core = build_model(ModelConfig(**settings, policy=policy))
    return core, torch.optim.AdamW(core.parameters(), lr=1e-3)


def give(core: TwoTower, **values: float) -> None:
    """Give every trained tensor a gradient of ones, or of the value for the ending of its name."""
    for name, parameter in core.trained().items():
        named = [value for end, value in values.items() if name.endswith(end.replace("__", "."))]
        parameter.grad = torch.full_like(parameter, named[0] if named else 1.0)


def test_key_biases_are_the_exception_by_role(settings: dict[str, Any]) -> None:
    core, optimizer = model(settings, "bitfit")
    first = FirstSteps(core, 0)
    for _ in range(2):
        give(core, key__bias=0.0)
        first.look(optimizer)
    first = FirstSteps(core, 0)
    give(core, query__bias=0.0)
    first.look(optimizer)
    with pytest.raises(
        ValueError, match=r"gradient of text.body.encoder.layer.0.attention.self.query.bias, .*1.*query"
    ):
        first.look(optimizer)


def test_a_dead_tensor_beside_lora_stops_the_second_step(settings: dict[str, Any]) -> None:
    core, optimizer = model(settings, "lora(r=2)+layernorm")
    first = FirstSteps(core, 0)
    give(core, **{"lora__a": 0.0, "blocks__0__norm1__bias": 0.0})
    first.look(optimizer)
    give(core, **{"blocks__0__norm1__bias": 0.0})
    with pytest.raises(
        ValueError, match=r"^the gradient of vision.body.blocks.0.norm1.bias was zero in each of the fir"
    ):
        first.look(optimizer)


def test_a_key_bias_without_any_gradient_is_no_exception(settings: dict[str, Any]) -> None:
    core, optimizer = model(settings, "bitfit")
    give(core)
    core.text.body.encoder.layer[1].attention.self.key.bias.grad = None
    with pytest.raises(ValueError, match=r"step left text.body.encoder.layer.1.attention.self.key.bias without a grad"):
        FirstSteps(core, 0).look(optimizer)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_living_step_of_two_that_count_is_enough(settings: dict[str, Any], bad: float) -> None:
    core, optimizer = model(settings, "layernorm")
    for parameter in core.trained().values():
        parameter.data.fill_(1.0)
    first = FirstSteps(core, 0)
    for values in ({"norm__weight": 0.0}, {"norm__bias": bad, "norm__weight": 0.0}, {"norm__bias": 0.0}):
        give(core, **values)
        first.look(optimizer)
    assert first.left == 0


def test_a_run_is_refused_before_its_folder_is_made(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        **settings | {"vision": DEAD}, policy="full", data=str(pictures / "manifest.jsonl"), output=str(tmp_path / "r")
    )
    message = r"^full \(parameters\) trains last.weight, last.bias, and the output of the vision tower 'py:tests.train"
    with pytest.raises(ValueError, match=message):
        align(config, Console(quiet=True))
    assert not (tmp_path / "r").exists()


def test_all_processes_stop_together(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data: dict[str, Any] = {"data": str(pictures / "manifest.jsonl"), "workers": 0, "test_split": "none"}
    config = settings | data | {"vision": FORGETFUL, "policy": "full", "batch_size": 6, "output": str(tmp_path / "run")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [__file__, json.dumps(config), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "the first step left vision.body.last.weight, vision.body.last.bias without a gradient" in said[0]


def moved(core: TwoTower, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in core.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("policy", ["bitfit", "lora(targets=all)", "lilt", "deep_adapter+layernorm", "last(1)"])
def test_a_whole_run_changes_the_trained_tensors_and_no_other_bit(run: Run, policy: str) -> None:
    done = run(policy=policy, epochs=2)
    exempt = {f"text.body.encoder.layer.{i}.attention.self.key.bias" for i in (0, 1)}
    trained = done.model.trained().keys()
    assert trained - exempt <= moved(done.model, build_model(done.config).state_dict()) <= trained


def main(config: str, folder: str) -> None:
    """Train in one of several processes and write what it was stopped with."""
    try:
        align(TrainConfig(**json.loads(config)), Console(quiet=True))
    except ValueError as error:
        (Path(folder) / f"{distributed.rank()}.txt").write_text(str(error))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
