"""A program for `torchrun`: one step and one evaluation, written to files, the same whatever the number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from lilt import distributed
from lilt.build import build_model, build_pairs
from lilt.config import TrainConfig
from lilt.data import Batch, Sample, read_manifest, select
from lilt.evaluate import embed_split
from lilt.model import TwoTower
from lilt.train.step import SAME, Learner, Objective, backward

CAPTIONS = ("a red picture", "blue paint", "the boat", "all of it", "a photo", "white paper", "blue paint", "paint")


def build(vision: str, text: str, same: str) -> tuple[TwoTower, TrainConfig]:
    config = TrainConfig(
        vision=vision, text=text, policy="full", projection="linear(dim=16)", same=same, augment="none"
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
    vision: str, text: str, folder: Path, same: str, accelerator: Accelerator, micro_batch: int | None = None
) -> dict[str, Tensor]:
    """Do one step as the Trainer does and return the loss and every gradient."""
    core, config = build(vision, text, same)
    model = accelerator.prepare(Learner(core))
    share = 8 // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    loss, parts, _ = backward(model, Objective(same), batch(core, config, folder, rows), accelerator, micro_batch)
    found = {name: p.grad for name, p in core.trained().items() if p.grad is not None}
    assert len(found) == len(core.trained())
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
    made = {same: gradients(vision, text, folder, same, accelerator) for same in SAME}
    # three rows at a time: 3, 3 and 2 in one process, 3 and 1 in each of two
    made |= {f"{same}.micro": gradients(vision, text, folder, same, accelerator, 3) for same in SAME}
    made["evaluation"] = evaluation(vision, text, folder)
    for name, tensors in made.items():
        plain = {key: t.detach().contiguous() for key, t in tensors.items()}
        save_file(plain, target / f"{name}.{accelerator.num_processes}.{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
