"""Time LoRA and DoRA beside a layer, inside its weight, and as the peft library does it, on the same towers.

OMP_NUM_THREADS=1 python benchmarks/lora_speed.py --repeats 15
A repeat runs each variant once in turn, so that other work on the machine meets all alike; ratios are medians over
repeats of forward and backward. Appends one JSON line per tower and variant to results/lora_speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from transformers import BertConfig, BertTokenizer

from lilt.policies import apply, parse_policy, plan
from lilt.towers import Tower, build_tower

RESULTS = Path(__file__).parent / "results" / "lora_speed.jsonl"
QKV = ["qkv", "query", "key", "value"]
Step = Callable[[], None]


def vision() -> Tower:
    """Return a ViT with a width and depth like DeiT-tiny's, with random weights."""
    return build_tower(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=6), "vision")


def text() -> Tower:
    """Return a BERT of four layers, with random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "red", "boat"]
    with tempfile.TemporaryDirectory() as name:
        BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024).save_pretrained(
            name
        )
        Path(name, "vocab.txt").write_text("\n".join(words))
        BertTokenizer(vocab=str(Path(name, "vocab.txt"))).save_pretrained(name)
        return build_tower(f"hf:{name}?pretrained=false", "text")


def inputs(tower: Tower, batch: int) -> Any:
    """Return a random batch: images of 224 px, or captions of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    if tower.side == "vision":
        return torch.randn(batch, 3, 224, 224, generator=generator)
    ids = torch.randint(4, 9, (2 * batch, 32), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(tower: Tower, spec: str, inside: bool) -> Tower:
    """Apply a policy; inside: as if no layer's forward were called, so that each weight is parametrized."""
    if inside:
        leaves = tuple(replace(leaf, order=None) for leaf in tower.anatomy.leaves)
        tower.anatomy = replace(tower.anatomy, leaves=leaves)
    apply(plan(parse_policy(spec, tower.side), tower), tower)
    return tower


def theirs(tower: Tower, dora: bool) -> Tower:
    """Let peft adapt the same weights."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=QKV, use_dora=dora)
    peft.inject_adapter_in_model(config, tower.body)
    return tower


VARIANTS: dict[str, Callable[[Tower], Tower]] = {
    "lora, side branch": lambda tower: ours(tower, "lora", inside=False),
    "lora, in the weight": lambda tower: ours(tower, "lora", inside=True),
    "lora, peft": lambda tower: theirs(tower, dora=False),
    "dora, side branch": lambda tower: ours(tower, "lora(dora=true)", inside=False),
    "dora, in the weight": lambda tower: ours(tower, "lora(dora=true)", inside=True),
    "dora, peft": lambda tower: theirs(tower, dora=True),
    "full": lambda tower: ours(tower, "full", inside=False),
}


def seconds(tower: Tower, batch: Any) -> float:
    """Time one forward and backward: on a CPU by the process's own time, which other work disturbs least."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    tower(batch).square().sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = clock() - start
    tower.zero_grad()
    return elapsed


def measure(name: str, build: Callable[[], Tower], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time every variant on one tower; ratios are taken within a repeat, against peft's of the same kind."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    towers = {variant: make(build()).to(device).train() for variant, make in VARIANTS.items()}
    batch = inputs(towers["full"], size)
    batch = {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats + 2):
        for variant, tower in towers.items():
            elapsed = seconds(tower, batch)
            if repeat >= 2:  # the first two warm up
                times[variant].append(elapsed)
    rows = []
    for variant, own in times.items():
        witness = times["dora, peft" if variant.startswith("dora") else "lora, peft"]
        rows.append(
            {
                "tower": name,
                "variant": variant,
                "trained": sum(p.numel() for p in towers[variant].parameters() if p.requires_grad),
                "milliseconds": round(1000 * statistics.median(own), 2),
                "over_peft": round(statistics.median(a / b for a, b in zip(own, witness, strict=True)), 3),
                "over_full": round(statistics.median(a / b for a, b in zip(own, times["full"], strict=True)), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8, help="images; captions are twice as many")
    given = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}"
    about = {"date": date.today().isoformat(), "machine": machine, "peft": peft.__version__, "batch": given.batch}
    print(machine, f"peft {peft.__version__}")
    rows = [
        {**about, "repeats": given.repeats, **row}
        for name, build in (("ViT, 6 x 192", vision), ("BERT, 4 x 256", text))
        for row in measure(name, build, given.batch, given.repeats)
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            print(f"{row['tower']:14} {row['variant']:20} {row['milliseconds']:8.1f} ms", end="")
            print(f"{row['over_peft']:8.3f} of peft {row['over_full']:8.3f} of full {row['trained']:9,} trained")


if __name__ == "__main__":
    main()
