"""The policy study: what each policy gains on RSICD and what the vision tower keeps of what it knew.

LILT_KIT=FOLDER python benchmarks/policies.py --seeds 0,1,2 [--images 437,1747,4367,all] [--lr 1e-3,own]
One `lilt train` per policy, learning rate, number of training images and seed, each in its own process; a run that is
in results/policies.jsonl already is passed over, so that the study can be stopped and gone on with. All runs have the
same number of steps, whatever their data, and are measured at their end; rates are compared on validation. With
--same_compute a policy has as many steps as cost, by the FLOPs of `lilt budgets`, what --steps of full training do.
Knowledge kept: top-1 of DeiT-tiny's own classifier on the tuned features over top-1 on the original ones, 1,000
ImageNet photographs, at the resolution of training. Options of `lilt train` are handed on. Needs hours on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rsicd import collect

import lilt
from lilt.budgets import compare
from lilt.evaluate import Setting, parse_task
from lilt.registry import split_top
from lilt.towers import meta_tower

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "policies.jsonl"
RECIPE = HERE.parent / "recipes" / "rsicd.yaml"
POLICIES = (
    "frozen,layernorm,lora,lilt,full,bitfit,adapter,lit,lit_mirror,last(2),attention,layernorm+bitfit,lora(targets=all),"
    "adapter(place=parallel),mlp,deep_adapter,prompt(depth=deep),ia3,first(2),random(0.07),lora(dora=true),prompt"
)
PAIRS = 8734
CLASSIFIER = "conserve(classifier(data=$LILT_KIT/zeroshot/imagenet1k.jsonl,image_root=$LILT_KIT,label=index))"


@cache
def step_ratio(policy: str) -> float:
    """Return the FLOPs of a policy's step relative to full training."""
    recipe = yaml.safe_load(RECIPE.read_text())
    towers = meta_tower(recipe["vision"], "vision", recipe["image_px"]), meta_tower(recipe["text"], "text")
    (row,) = compare(*towers, [policy], text_tokens=recipe["train_tokens"]).rows
    return row.step_flops_ratio


def knowledge(folder: Path) -> dict[str, float]:
    """Return top-1 before and after (percent), and the share that was kept."""
    values = dict(parse_task(CLASSIFIER)(lilt.load(folder), Setting()))
    return {name: values[f"classifier/top1/{name}"] for name in ("before", "after", "kept")}


def folder_of(runs: Path, key: Sequence[Any]) -> Path:
    """Return where a run lies."""
    return runs / "".join(c if c.isalnum() else "_" for c in "-".join(map(str, key)))


def train(folder: Path, options: list[str]) -> None:
    """Train one run in a process of its own, or go on with one that was stopped."""
    command = [sys.executable, "-m", "lilt", "train"]
    if (folder / "state").exists():
        subprocess.run([*command, "--config", str(folder / "config.yaml"), "--resume"], check=True)
        return
    subprocess.run([*command, "--config", str(RECIPE), "--overwrite", "--output", str(folder), *options], check=True)


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
    parser.add_argument("--steps", type=int, default=136, help="136 of 64 pairs are one pass over all images")
    parser.add_argument("--batch_size", default="64")
    parser.add_argument("--same_compute", action="store_true", help="more steps for policies whose step costs less")
    parser.add_argument("--runs", type=Path, default=Path("runs/policies"))
    given, more = parser.parse_known_args()
    os.environ["LILT_KIT"]  # the recipe reads it: fail early
    grid = itertools.product(
        given.seeds.split(","), given.images.split(","), split_top(given.policies, ","), given.lr.split(",")
    )
    for seed, images, policy, lr in grid:
        steps = round(given.steps / step_ratio(policy)) if given.same_compute else given.steps
        key = (policy, lr, images, seed, steps, given.batch_size, *more)
        if key in done():
            continue
        folder = folder_of(given.runs, key)
        pairs = PAIRS if images == "all" else int(images)
        options = ["--policy", policy, "--seed", seed, "--max_steps", str(steps), "--batch_size", given.batch_size]
        options += ["--eval_every", str(steps), *more]  # in passes: never before the end
        options += [] if lr == "own" else ["--lr", lr]
        options += [] if images == "all" else ["--max_images", images]
        train(folder, options)
        row: dict[str, Any] = {"key": key, "images": pairs} | collect(folder) | knowledge(folder)
        row |= {"study": "compute" if given.same_compute else "steps", "step_ratio": step_ratio(policy)}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(
            f"{policy}, lr {lr}, {images} images, seed {seed}: validation {row['val_mean_recall']:.2f}, "
            f"test {row['test']['mean_recall']:.2f}, kept {row['kept']:.1f} %"
        )
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
