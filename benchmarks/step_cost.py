"""Measured over predicted step time, relative to full training: does `lilt budgets` promise what a step costs?

python benchmarks/step_cost.py --rounds 20
ViT-tiny at 128 px and a BERT of 4 layers and width 256, random weights, 25 tokens. All policies take turns step by step
and the median counts, so that other work on the machine hits them alike. Predicted is `step_flops_ratio` alone: matrix
products, no optimizer, no elementwise work. Appends one JSON line a policy to results/step_cost.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from lilt.budgets import compare
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.registry import split_top
from lilt.towers import Tower, TowerSpec, build_tower
from lilt.towers.meta import NoTokenizer
from lilt.towers.text import from_hf_text

RESULTS = Path(__file__).parent / "results" / "step_cost.jsonl"
POLICIES = (
    "frozen,layernorm(blocks=-1),layernorm,bitfit,ia3,lora,lora(targets=all),prompt,adapter,lilt,deep_adapter,last(2),"
    "lit,attention,mlp,full"
)
PX, TOKENS = 128, 25
BERT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}


def towers() -> tuple[Tower, Tower]:
    torch.manual_seed(0)
    vision = build_tower("timm:vit_tiny_patch16_224?pretrained=false", "vision", image_px=PX)
    body = BertModel(BertConfig(**BERT))  # type: ignore[arg-type]
    return vision, from_hf_text(body, "bert of 4 layers", TowerSpec("hf"), NoTokenizer())


class Step:
    """One policy's model and optimizer; each call trains one step and notes how long its parts took."""

    def __init__(self, policy: str, vision: Tower, text: Tower, device: str) -> None:
        torch.manual_seed(0)
        vision, text = copy.deepcopy(vision), copy.deepcopy(text)
        for tower in (vision, text):
            apply(plan(parse_policy(policy, tower.side), tower), tower)
        projection = build_projection("linear(dim=256)", vision.dim, text.dim)
        self.core = TwoTower(vision, text, projection, Scale()).to(device).train()
        self.optimizer = torch.optim.AdamW(self.core.trained().values(), lr=1e-5)
        self.device = device
        self.parts: list[tuple[float, float, float]] = []

    def __call__(self, images: Tensor, tokens: dict[str, Tensor]) -> None:
        start = self.now()
        out = self.core(images, tokens)
        logits = out.scale * out.image @ out.text.T
        rows = torch.arange(len(logits), device=logits.device)
        loss = F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)
        forward = self.now()
        loss.backward()
        backward = self.now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parts.append((forward - start, backward - forward, self.now() - backward))

    def now(self) -> float:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def seconds(self) -> float:
        return statistics.median(sum(parts) for parts in self.parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    policies = list(dict.fromkeys([*split_top(given.policies, ","), "full"]))
    vision, text = towers()
    budgets = compare(vision, text, policies, batch_size=given.batch_size, text_tokens=TOKENS)
    predicted = {row.policy: row for row in budgets.rows}
    steps = {policy: Step(policy, vision, text, given.device) for policy in predicted}
    images = torch.randn(given.batch_size, 3, PX, PX, device=given.device)
    ids = torch.randint(1000, 30000, (given.batch_size, TOKENS), device=given.device)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for turn in range(given.rounds + 1):
        for step in steps.values():
            step(images, tokens)
            if turn == 0:
                step.parts.clear()  # the first step of each warms up and makes the optimizer's state
    full = steps["full"].seconds()
    lines: list[dict[str, Any]] = []
    print(f"{'policy':<24}{'predicted':>10}{'measured':>10}{'ratio':>8}   forward backward optimizer (ms)")
    for policy, step in steps.items():
        expected, measured = predicted[policy].step_flops_ratio, step.seconds() / full
        parts = [statistics.median(column) for column in zip(*step.parts, strict=True)]
        milliseconds = "".join(f"{1000 * part:>9.1f}" for part in parts)
        print(f"{policy:<24}{expected:>10.3f}{measured:>10.3f}{measured / expected:>8.2f} {milliseconds}")
        lines.append(
            {
                "date": date.today().isoformat(),
                "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads of "
                f"{os.cpu_count()} cores, {given.device}, torch {torch.__version__}",
                "about": budgets.about,
                "policy": policy,
                "trainable": predicted[policy].trainable,
                "predicted": expected,
                "measured": measured,
                "measured_over_predicted": measured / expected,
                **dict(zip(("forward_s", "backward_s", "optimizer_s"), parts, strict=True)),
                "rounds": given.rounds,
                "batch_size": given.batch_size,
            }
        )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
