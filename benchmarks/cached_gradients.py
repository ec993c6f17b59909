"""What micro-batches cost: a step in pieces over the same step in one, measured and as the arithmetic promises.

python benchmarks/cached_gradients.py --rounds 10 [--size base --batch_size 8 --pieces 2]
The first pass runs everything forward without keeping it; the second begins behind the frozen front of each tower; of
eight pieces or less the last is passed once. Promised: what is done twice, (all forward - front forward) of all pieces
but that one, and the step, over the step, in FLOPs of matrix products, counted on the meta device. tiny:
ViT-tiny at 128 px and a BERT of 4 layers and width 256; base: ViT-B/16 at 224 px and a BERT of 12 layers and width 768;
random weights, 25 tokens. Policies and ways take turns and the medians count. Appends one JSON line a policy to
results/cached_gradients.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from step_cost import PX, TOKENS
from torch import Tensor
from transformers import BertConfig, BertModel

from lilt.budgets.cost import meta_batch, step_cost
from lilt.budgets.counter import Counter
from lilt.data import Batch
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.registry import split_top
from lilt.towers import Tower, TowerSpec, build_tower
from lilt.towers.front import Front
from lilt.towers.meta import NoTokenizer, without_weights
from lilt.towers.text import from_hf_text
from lilt.train.learner import Learner
from lilt.train.reuse import find_fronts
from lilt.train.step import HELD, Objective, backward

RESULTS = Path(__file__).parent / "results" / "cached_gradients.jsonl"
SIZES = {"tiny": ("vit_tiny_patch16_224", PX, 256, 4, 4), "base": ("vit_base_patch16_224", 224, 768, 12, 12)}


def policies(size: str) -> list[str]:
    """Return all of a tower, all norms, norms of the upper half, the upper half, the last two blocks, the heads."""
    vision, text = {"tiny": (6, 2), "base": (6, 6)}[size]
    halves = [f"layernorm(blocks=last:{vision})//layernorm(blocks=last:{text})", f"last({vision})//last({text})"]
    return ["full", "layernorm", "lora", *halves, "last(1)", "frozen"]


def towers(size: str) -> tuple[Tower, Tower]:
    name, px, width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    vision = build_tower(f"timm:{name}?pretrained=false", "vision", image_px=px)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    text = from_hf_text(BertModel(config), f"bert of {layers} layers", TowerSpec("hf"), NoTokenizer())
    return vision, text


def build(policy: str, size: str) -> TwoTower:
    """Return a model with a policy, or with one for each tower, parted by //."""
    return tuned(policy, *towers(size))


def tuned(policy: str, vision: Tower, text: Tower) -> TwoTower:
    """Apply a policy to two towers and put heads on."""
    for tower, spec in zip((vision, text), (policy.split("//") * 2)[:2], strict=True):
        apply(plan(parse_policy(spec, tower.side), tower), tower)
    return TwoTower(vision, text, build_projection("linear(dim=256)", vision.dim, text.dim), Scale())


class Flops(NamedTuple):
    """FLOPs of matrix products: of everything forward, of a step of training, and of the frozen fronts forward."""

    forward: int
    step: int
    fronts: int


def count(policy: str, vision: Tower, text: Tower, rows: int, length: int = TOKENS) -> Flops:
    """Count what a policy costs on towers that have none yet; where their fronts end is found on the real ones."""
    meta = without_weights(vision), without_weights(text)
    counter = Counter()
    images, tokens = meta_batch(*meta, rows, length)
    with counter, torch.device("meta"):
        core = tuned(policy, *meta)
    step = step_cost(core, images, tokens, counter).flops
    before = counter.flops
    with counter, torch.no_grad():
        core(images, tokens)
    forward = counter.flops - before
    before = counter.flops
    fronts = find_fronts(tuned(policy, vision, text))
    with counter:
        for side, front in fronts.items():
            bare = Front(getattr(core, side), front.last, front.as_tuple)
            bare.record(images if side == "vision" else tokens)
    return Flops(forward, step, counter.flops - before)


class Steps:
    """A policy's model, and its steps in one piece and in several."""

    def __init__(self, policy: str, size: str, device: torch.device):
        core = build(policy, size).to(device)
        self.fronts = find_fronts(core)
        self.learner = Learner(core.train(), None, self.fronts)
        self.seconds: dict[str, list[float]] = {"whole": [], "pieces": []}

    def __call__(self, way: str, batch: Batch, micro_batch: int | None, accelerator: Accelerator) -> None:
        self.learner.zero_grad()
        began = time.perf_counter()
        done = backward(self.learner, Objective(), [batch], accelerator, micro_batch, None, self.fronts)
        done.loss.item()
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds[way].append(time.perf_counter() - began)


def noise(size: str, rows: int) -> Batch:
    px = SIZES[size][1]
    ids = torch.randint(1000, 30000, (rows, TOKENS))
    tokens: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    number = torch.arange(rows)
    return Batch(torch.randn(rows, 3, px, px), tokens, number, number, torch.ones(rows, dtype=torch.bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--policies", default="")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=2)
    given = parser.parse_args()
    accelerator = Accelerator()
    chosen = split_top(given.policies, ",") if given.policies else policies(given.size)
    ways = {"whole": None, "pieces": given.batch_size // given.pieces}
    batch = noise(given.size, given.batch_size).to(accelerator.device)
    make = partial(Steps, size=given.size, device=accelerator.device)
    steps = {policy: make(policy) for policy in chosen}
    for turn in range(given.rounds + 1):
        for step in steps.values():
            for way, micro_batch in ways.items():
                step(way, batch, micro_batch, accelerator)
            if turn == 0:
                step.seconds = {way: [] for way in ways}  # the first is not like the others
    with RESULTS.open("a", encoding="utf-8") as stream:
        for policy, step in steps.items():
            cost = count(policy, *towers(given.size), given.batch_size)
            twice = 1 if given.pieces > HELD else 1 - 1 / given.pieces
            expected = (twice * (cost.forward - cost.fronts) + cost.step) / cost.step
            whole, pieces = (statistics.median(step.seconds[way]) for way in ways)
            row = {
                "date": date.today().isoformat(),
                "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads of "
                f"{os.cpu_count()} cores, {accelerator.device.type}, torch {torch.__version__}",
                "size": given.size,
                "policy": policy,
                "fronts": {side: front.last or "all" for side, front in step.fronts.items()},
                "batch_size": given.batch_size,
                "pieces": given.pieces,
                "rounds": given.rounds,
                "promised": expected,
                "measured": pieces / whole,
                "whole_s": whole,
            }
            stream.write(json.dumps(row) + "\n")
            print(
                f"{policy:<60} promised {expected:.3f}  measured {row['measured']:.3f}  "
                f"ratio {row['measured'] / expected:.3f}  whole {1000 * whole:.0f} ms"
            )
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
