"""A program for `torchrun`: one step and one evaluation, written to files, the same whatever the number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from lilt import distributed
from lilt.build import build_model, build_pairs, build_teacher_of
from lilt.config import TrainConfig
from lilt.data import Batch, Sample, read_manifest, select
from lilt.evaluate import embed_split
from lilt.losses import SAME, build_loss
from lilt.model import TwoTower
from lilt.train.distill import Distiller
from lilt.train.learner import Learner
from lilt.train.objectives import parse_objective
from lilt.train.step import Objective, backward

CAPTIONS = ("a red picture", "blue paint", "the boat", "all of it", "a photo", "white paper", "blue paint", "paint")


# what is compared: each way with equal pairs, each loss, each kind of teacher
CASES: dict[str, dict[str, Any]] = {
    **{same: {"same": same} for same in SAME},
    **{loss: {"loss": loss} for loss in ("softmax(smoothing=0.1,chunk=3)", "sigmoid", "hinge(hardest=true)")},
    "two points": {"shared": "transformer(points=2,heads=2)"},
    **{
        distill: {"teacher": "timm:test_vit?pretrained=false&image_px=32", "distill": distill}
        for distill in ("contrastive(learn=true,bank=8)", "mse", "kl", "relational")
    },
}


def build(vision: str, text: str, case: str) -> tuple[TwoTower, TrainConfig]:
    config = TrainConfig(
        vision=vision, text=text, policy="full", projection="linear(dim=16)", augment="none", **CASES[case]
    )
    return build_model(config).eval(), config  # without dropout, whose stream belongs to a rank


def batch(model: TwoTower, config: TrainConfig, folder: Path, rows: slice) -> Batch:
    """Eight pairs: captions 1 and 6 are equal, pictures 0 and 5 are views of one, the last is missing."""
    files = sorted(folder.glob("*.png"))[:6]
    files = [*files, folder / "blue1.jpg", folder / "missing.png"]
    dataset, collate = build_pairs(
        config, model, [Sample(f, (c,), "train") for f, c in zip(files, CAPTIONS, strict=True)]
    )
    made = collate([dataset[0, i] for i in range(8)][rows])
    made.image_id[made.image_id == 5] = 0
    return made


def gradients(
    vision: str, text: str, folder: Path, case: str, accelerator: Accelerator, micro_batch: int | None = None
) -> dict[str, Tensor]:
    """Do a step as the Trainer does, the third one where a bank has to fill first; return loss and gradients."""
    core, config = build(vision, text, case)
    goal = parse_objective(config.distill)
    teacher = build_teacher_of(config, core, goal.needs)
    torch.manual_seed(0)
    distiller = None if teacher is None else Distiller(goal, 16, teacher.dim, batch_size=8)
    learner = Learner(core, distiller)
    model = accelerator.prepare(learner)
    share = 8 // accelerator.num_processes
    ours = batch(
        core, config, folder, slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    )
    objective = Objective(build_loss(config.loss), config.same, distiller)
    for _ in range(3 if "bank" in case else 1):
        model.zero_grad()
        loss, parts, _ = backward(model, objective, [ours], accelerator, micro_batch, teacher)
    found = {name: p.grad for name, p in learner.trained().items() if p.grad is not None}
    assert found.keys() == learner.trained().keys()
    means = {name: distributed.mean(value.detach()) for name, value in ({"loss": loss} | parts).items()}
    return found | {f"mean {name}": value for name, value in means.items()}


def evaluation(vision: str, text: str, folder: Path) -> dict[str, Tensor]:
    """Embed an odd number of images, one of them missing."""
    core, _ = build(vision, text, "positive")
    samples = select(read_manifest(folder / "manifest.jsonl"), "train")[:6]
    samples.insert(3, Sample(folder / "missing.png", ("a boat",), "train"))
    embedded = embed_split(core, samples, batch_size=2)
    faults = torch.tensor([len(embedded.faults), embedded.expected_images, embedded.cut])
    return {"image": embedded.image, "text": embedded.text, "owner": embedded.owner, "counts": faults}


def main(vision: str, text: str, pictures: str, output: str) -> None:
    accelerator = Accelerator()
    folder, target = Path(pictures), Path(output)
    made = {case: gradients(vision, text, folder, case, accelerator) for case in CASES}
    # three rows at a time: 3, 3 and 2 in one process, 3 and 1 in each of two
    made |= {f"{case}.micro": gradients(vision, text, folder, case, accelerator, 3) for case in CASES}
    made["evaluation"] = evaluation(vision, text, folder)
    for name, tensors in made.items():
        plain = {key: t.detach().contiguous() for key, t in tensors.items()}
        save_file(plain, target / f"{name}.{accelerator.num_processes}.{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
