"""The policy study: what each policy gains on RSICD and what the vision tower keeps of what it knew.

LILT_KIT=FOLDER python benchmarks/policies.py --seeds 0,1,2 --epochs 4 [--images 2000] [--lr 1e-3,3e-3]
One `lilt train` per policy, learning rate, number of training images and seed, each in its own process; a run that is
in results/policies.jsonl already is passed over, so that the study can be stopped and gone on with. Knowledge kept:
top-1 of DeiT-tiny's own classifier on the tuned features over top-1 on the original ones, 1,000 ImageNet photographs,
at the resolution of the training. Needs hours on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rsicd import collect
from safetensors.torch import load_file
from torch import Tensor

import lilt
from lilt.data import eval_transform, open_image
from lilt.registry import split_top
from lilt.towers import ImageContract, Tower

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "policies.jsonl"
POLICIES = (
    "frozen,layernorm,bitfit,layernorm+bitfit,attention,mlp,last(2),first(2),random(0.07),lora,lora(targets=all),"
    "lora(dora=true),ia3,adapter,adapter(place=parallel),deep_adapter,deep_adapter+layernorm,prompt,prompt(depth=deep),"
    "lit,lit_mirror,lilt,full"
)
WEIGHTS = "weights/deit_tiny_patch16_224.fp16.safetensors"


@cache
def photographs(kit: Path, contract: ImageContract) -> tuple[Tensor, Tensor]:
    """Return the ImageNet sample as the tower wants it (N, 3, H, W), and its classes (N,)."""
    lines = [json.loads(line) for line in (kit / "zeroshot" / "imagenet1k.jsonl").read_text().splitlines()]
    transform = eval_transform(contract)
    images = torch.stack([transform(open_image(kit / line["image"])) for line in lines])
    return images, torch.tensor([line["index"] for line in lines])


@torch.no_grad()
def top1(tower: Tower, kit: Path) -> float:
    """Return the top-1 (percent) of the tower's original classifier on its class token now."""
    assert isinstance(tower.contract, ImageContract)
    images, classes = photographs(kit, tower.contract)
    state = load_file(kit / WEIGHTS)
    right = 0
    for batch, labels in zip(images.split(100), classes.split(100), strict=True):
        logits = tower.tokens(batch).features[:, 0] @ state["head.weight"].float().T + state["head.bias"].float()
        right += int((logits.argmax(1) == labels).sum())
    return 100 * right / len(classes)


def knowledge(folder: Path, kit: Path) -> dict[str, float]:
    """Return top-1 before and after, and the share that was kept."""
    model = lilt.load(folder)
    after = top1(model.core.vision, kit)
    with model.disabled():
        before = top1(model.core.vision, kit)
    return {"top1_before": before, "top1_after": after, "kept": after / before}


def train(folder: Path, options: list[str]) -> None:
    """Train one run in a process of its own, or go on with one that was stopped."""
    command = [sys.executable, "-m", "lilt", "train"]
    if (folder / "state").exists():
        subprocess.run([*command, "--config", str(folder / "config.yaml"), "--resume"], check=True)
        return
    recipe = HERE.parent / "recipes" / "rsicd.yaml"
    subprocess.run([*command, "--config", str(recipe), "--overwrite", "--output", str(folder), *options], check=True)


def done() -> set[tuple[Any, ...]]:
    """Return the keys of the runs that are recorded."""
    if not RESULTS.is_file():
        return set()
    return {tuple(json.loads(line)["key"]) for line in RESULTS.read_text().splitlines()}


def main() -> None:
    """Run what is missing and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--lr", default="own", help="learning rates of the tower tensors; own: the policy's")
    parser.add_argument("--images", default="all", help="numbers of training images")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=float, default=4, help="passes over as many pairs as were asked for")
    parser.add_argument("--runs", type=Path, default=Path("runs/policies"))
    given, more = parser.parse_known_args()
    kit = Path(os.environ["LILT_KIT"])
    grid = itertools.product(
        given.seeds.split(","), given.images.split(","), split_top(given.policies, ","), given.lr.split(",")
    )
    for seed, images, policy, lr in grid:
        key = (policy, lr, images, seed, given.epochs, *more)
        if key in done():
            continue
        name = "".join(c if c.isalnum() else "_" for c in "-".join(map(str, key)))
        options = ["--policy", policy, "--seed", seed, "--epochs", str(given.epochs), *more]
        options += [] if lr == "own" else ["--lr", lr]
        options += [] if images == "all" else ["--max_images", images]
        train(given.runs / name, options)
        row = {"key": key, "images": images} | collect(given.runs / name) | knowledge(given.runs / name, kit)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(
            f"{policy}, lr {lr}, {images} images, seed {seed}: validation {row['val_mean_recall']:.2f}, "
            f"test {row['test']['mean_recall']:.2f}, kept {row['kept']:.2f}"
        )
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
