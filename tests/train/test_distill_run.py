"""Runs with a teacher: every objective trains, what only training needs is resumed and never in the checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lilt import checkpoint, load
from lilt.build import build_model, build_teacher_of
from lilt.config import TrainConfig
from lilt.train import Trainer, read_metrics
from lilt.train.objectives import parse_objective
from lilt.train.state import find_state
from tests.train.conftest import Run, interrupt_at

TEACHER = "timm:test_vit?pretrained=false&image_px=32"
OBJECTIVES = [
    "contrastive(bank=0)", "contrastive(bank=6)", "contrastive(learn=true,bank=6)", "mse", "cosine", "kl", "relational",
]  # fmt: skip


@pytest.mark.parametrize("distill", OBJECTIVES)
def test_every_objective_trains_with_every_part_alive(run: Run, distill: str) -> None:
    done = run(teacher=TEACHER, distill=distill, epochs=3, policy="layernorm")
    steps = [r for r in read_metrics(done.folder) if "loss" in r]
    assert len(steps) == 6
    for record in steps:
        together = record["contrastive"] + (record["distill_image"] + record["distill_text"]) / 2
        assert record["loss"] == pytest.approx(together, rel=1e-4)
    if "learn" in distill:
        temperatures = [record["distill_temperature"] for record in steps]
        assert len(set(temperatures)) == 6  # a learned temperature moves with each step


def test_the_weights_count(run: Run) -> None:
    done = run(teacher=TEACHER, distill="mse", distill_weight=3.0, distill_image=0.2, distill_text=0.7, epochs=1)
    for record in (r for r in read_metrics(done.folder) if "loss" in r):
        expected = record["contrastive"] + 3 * (0.2 * record["distill_image"] + 0.7 * record["distill_text"])
        assert record["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_checkpoint_holds_the_model_alone_and_the_state_the_head_too(run: Run) -> None:
    done = run(teacher=TEACHER, distill="contrastive(learn=true,bank=6)", epochs=1)
    saved = load_file(done.folder / checkpoint.ADAPTER)
    assert set(saved) == set(done.model.trained())
    state = load_file(find_state(done.folder)[0] / "trained.safetensors")
    assert set(state) - set(saved) == {
        "distiller.head.0.weight", "distiller.head.0.bias", "distiller.head.1.weight", "distiller.head.1.bias",
        "distiller.scale.log",
    }  # fmt: skip
    assert load(done.folder).core.trained().keys() == saved.keys()


@pytest.mark.parametrize("distill", ["contrastive(learn=true,bank=9)", "kl"])
@pytest.mark.parametrize("step", [1, 3])
def test_stop_and_resume_ends_in_the_same_bits(run: Run, distill: str, step: int) -> None:
    options: dict[str, Any] = {"teacher": TEACHER, "distill": distill, "epochs": 3, "augment": "crop(0.4,1)+hflip"}
    whole = run("whole", **options)
    first = run("parts", wish=interrupt_at(step), **options)
    assert not first.outcome.finished
    second = run("parts", resume=True, **options)
    assert second.outcome.finished
    for name, tensor in whole.model.trained().items():
        assert torch.equal(tensor, second.model.trained()[name]), name
    losses = [[r["loss"] for r in read_metrics(x.folder) if "loss" in r] for x in (whole, second)]
    assert losses[0] == losses[1]


def test_micro_batches_give_the_same_step(run: Run) -> None:
    options: dict[str, Any] = {"teacher": TEACHER, "distill": "contrastive(learn=true,bank=6)", "policy": "frozen"}
    whole, pieces = (run(name, epochs=3, micro_batch=size, **options) for name, size in (("w", None), ("p", 4)))
    losses = [[r["loss"] for r in read_metrics(x.folder) if "loss" in r] for x in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_teacher_is_neither_trained_nor_counted(run: Run) -> None:
    before = {}

    def look(trainer: Trainer) -> None:
        assert trainer.teacher is not None
        before.update({k: v.clone() for k, v in trainer.teacher.network.state_dict().items()})
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert not trained & {id(p) for p in trainer.teacher.network.parameters()}
        trainer.keep = trainer.teacher  # type: ignore[attr-defined]

    done = run(teacher=TEACHER, distill="mse", epochs=2, policy="full", wish=look)
    plain = build_model(done.config)
    assert sum(p.numel() for p in done.model.parameters()) == sum(p.numel() for p in plain.parameters())
    teacher = build_teacher_of(done.config, plain, "features")
    assert teacher is not None
    assert all(torch.equal(before[k], v) for k, v in teacher.network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": "contrastive(bank=4)"}, "a bank of 4 rows is smaller than the batch of 6"),
        ({"distill": "contrastive"}, "a bank of 65536 rows is used once it is full, and the run shows 12 pairs"),
        ({"distill": "kl", "teacher": "open_clip:ViT-B-32"}, "has no classifier that lilt knows to build"),
        ({"distill": "klm"}, r"unknown distillation objective 'klm'; known: .*Did you mean 'kl'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_training(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"teacher": TEACHER, "epochs": 1, **options})


@pytest.mark.parametrize(
    "loss",
    ["softmax(smoothing=0.1)", "softmax(chunk=4)", "sigmoid", "sigmoid(chunk=4)", "hinge", "hinge(hardest=true)"],
)
def test_every_loss_trains_and_is_loaded_again(run: Run, loss: str) -> None:
    done = run(loss=loss, epochs=2)
    saved = load_file(done.folder / checkpoint.ADAPTER)
    assert ("scale.log" in saved, "bias" in saved) == (not loss.startswith("hinge"), loss.startswith("sigmoid"))
    again = load(done.folder).core
    assert all(torch.equal(p, saved[name]) for name, p in again.trained().items())
    if "bias" in saved:
        assert saved["bias"] != -10  # it was trained


def test_the_needs_of_an_objective_reach_the_teacher(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, teacher=TEACHER, distill="kl")
    teacher = build_teacher_of(config, build_model(config), parse_objective("kl").needs)
    assert teacher is not None
    assert teacher.dim == 1000
