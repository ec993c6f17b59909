"""A program for `torchrun`: gradients and whole runs under the engines that it is told, written to files."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from lilt import distributed
from lilt.build import build_model
from lilt.config import TrainConfig
from lilt.losses import build_loss
from lilt.run import align
from lilt.train import Trainer
from lilt.train.engine import gathered, make_accelerator, prepare, spread
from lilt.train.learner import Learner
from lilt.train.optim import make_optimizer
from lilt.train.step import Objective, backward
from tests import joint_step

POLICIES = ("layernorm", "lora(r=2)", "full")
# whole runs by name; the towers are without dropout, whose stream belongs to a rank
RUNS: dict[str, dict[str, Any]] = {
    **{policy: {"policy": policy} for policy in POLICIES},
    "pieces": {"policy": "full", "micro_batch": 1, "loss": "sigmoid", "clip_norm": None},
    "bf16": {"policy": "layernorm", "precision": "bf16"},
    "blocks": {"policy": "lora(r=2)", "checkpointing": True, "compile": True, "compile_backend": "aot_eager"},
}
PARTS: dict[str, Any] = {"policy": "lora(r=2)", "max_steps": 4, "augment": "crop(0.4,1)"}


def fresh(precision: str = "no") -> Accelerator:
    AcceleratorState._reset_state(True)
    return make_accelerator(precision)


def gradients(config: TrainConfig, pictures: Path, micro_batch: int | None) -> dict[str, Tensor]:
    """Do a step as the Trainer does; return its loss, its gradients as a whole, and an embedding made beside it."""
    accelerator = fresh()
    core = build_model(config).eval()
    learner = Learner(core)
    spread(accelerator, learner)
    model, _ = prepare(accelerator, learner, make_optimizer(core, None, 1e-3, 0.0, 0.99))
    share = 8 // accelerator.num_processes
    start = accelerator.process_index * share
    batch = joint_step.batch(core, config, pictures, slice(start, start + share))
    done = backward(model, Objective(build_loss(config.loss)), [batch], accelerator, micro_batch)
    found = {name: p.grad for name, p in learner.trained().items() if p.grad is not None}
    assert found.keys() == learner.trained().keys()
    made = {name: distributed.whole(gradient) for name, gradient in found.items()}
    with torch.no_grad(), gathered(accelerator, core):
        if accelerator.is_main_process:  # an evaluation whose batches only one rank has
            made["embedding"] = core.encode_image(torch.ones(3, 3, 32, 32))
    return made | {"mean loss": distributed.mean(done.loss)}


def interrupt_at(step: int) -> Any:
    def watch(trainer: Trainer) -> None:
        def ask(*_: object) -> None:
            if trainer.place.step == step - 1 and trainer.core.training:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.core.vision.register_forward_hook(ask)

    return watch


def spoil_at(step: int) -> Any:
    """Break what the vision tower says of one row, in the last process."""

    def watch(trainer: Trainer) -> None:
        def change(_module: Any, _args: Any, output: Tensor) -> Tensor | None:
            last = distributed.rank() == distributed.world_size() - 1
            if trainer.place.step != step - 1 or not trainer.core.training or not last:
                return None
            mask = torch.zeros(len(output), 1)
            mask[-1] = float("nan")
            return output + mask

        trainer.core.vision.register_forward_hook(change)

    return watch


def main(vision: str, text: str, pictures: str, output: str, few: str = "") -> None:
    """few: do only the last policy, and this run."""
    folder = Path(output)
    towers: dict[str, Any] = {"vision": vision, "text": text, "projection": "linear(dim=16)"}
    for policy in POLICIES[-1:] if few else POLICIES:
        for micro_batch in (None, 1):
            config = TrainConfig(**towers, policy=policy, loss="sigmoid", augment="none")
            made = gradients(config, Path(pictures), micro_batch)
            if distributed.is_main():
                save_file({k: v.detach().contiguous() for k, v in made.items()}, folder / f"{policy}.{micro_batch}")
    plain: dict[str, Any] = {
        **towers, "data": f"{pictures}/manifest.jsonl", "batch_size": 8, "max_steps": 3, "log_every": 1, "workers": 0,
    }  # fmt: skip

    def run(name: str, watch: Any = lambda trainer: None, **options: Any) -> None:
        AcceleratorState._reset_state(True)
        align(TrainConfig(**{**plain, **options, "output": str(folder / f"run {name}")}), Console(quiet=True), watch)

    for name in [few] if few else RUNS:
        run(name, **RUNS[name])
    if few:
        return
    run("spoilt", spoil_at(2), policy="full")
    run("whole", **PARTS)
    run("half", interrupt_at(2), **PARTS)
    run("asked", interrupt_at(2), **{**PARTS, "log_every": 40, "eval_every": 40.0})
    run("parts", interrupt_at(2), **PARTS)
    run("parts", **PARTS, resume=True)


def under_each(engines: str, vision: str, text: str, pictures: str, few: str = "") -> None:
    """Do all of it under one engine after the other: JSON of the folder of each and what the launcher says for it."""
    for folder, variables in json.loads(engines).items():
        os.environ |= variables
        assert fresh().is_fsdp2 == ("ACCELERATE_USE_FSDP" in variables)
        main(vision, text, pictures, folder, few)
        for name in variables:
            del os.environ[name]


if __name__ == "__main__":
    under_each(*sys.argv[1:])
    distributed.leave()
