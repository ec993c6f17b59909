"""Runs of the trainer on the tiny towers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

from lilt import checkpoint
from lilt.build import build_model, build_pairs, build_splits, build_teacher_of
from lilt.config import TrainConfig
from lilt.data import Sample
from lilt.evaluate import evaluate_retrieval, flat
from lilt.model import TwoTower
from lilt.train import Outcome, RunLog, Trainer
from lilt.train.objectives import parse_objective

Run = Callable[..., "Finished"]
Wish = Callable[[Trainer], None]


@dataclass
class Finished:
    model: TwoTower
    outcome: Outcome
    folder: Path
    config: TrainConfig


@pytest.fixture
def run(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> Run:
    """Train as configured; wish(trainer) may prepare something, samples replace those of the manifest."""

    def start(
        name: str = "run", wish: Wish = lambda trainer: None, samples: list[Sample] | None = None, **options: Any
    ) -> Finished:
        plain = {"data": str(pictures / "manifest.jsonl"), "batch_size": 6, "workers": 0, "log_every": 1}
        folder = tmp_path / name
        config = TrainConfig(**{**settings, **plain, **options, "output": str(folder)})
        folder.mkdir(exist_ok=True)
        AcceleratorState._reset_state(True)
        splits = build_splits(config)
        model = build_model(config)
        dataset, collate = build_pairs(config, model, samples or splits.train)
        with RunLog(folder, Console(quiet=True)) as log:
            trainer = Trainer(
                model,
                dataset,
                collate,
                config,
                Accelerator(mixed_precision=config.precision),
                log,
                validate=(lambda core: flat(evaluate_retrieval(core, splits.val))) if splits.val else None,
                save=lambda core, values: void(checkpoint.save(core, config, folder, values)),
                teacher=build_teacher_of(config, model, parse_objective(config.distill).needs),
            )
            wish(trainer)
            return Finished(model, trainer.run(), folder, config)

    return start


def void(result: object) -> None:
    """Take a result and give none."""


def interrupt_at(step: int) -> Wish:
    """Send this process the signal of Ctrl-C in the middle of a step."""

    def wish(trainer: Trainer) -> None:
        def ask(*_: object) -> None:
            if trainer.place.step == step - 1 and trainer.core.training:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.core.text.register_forward_hook(ask)

    return wish
