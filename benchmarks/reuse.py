"""What an epoch costs when frozen parts are read instead of run: `lilt train` with --reuse off and with it on.

python benchmarks/reuse.py --towers base --images 64 [--policies "frozen,lit,last(2)"] [options of lilt train]
Each run is a process of its own on the demo without augmentation, and its rate that of its steps and data alone:
filling the store, which happens once, is not in it, and neither is evaluation. tiny: ViT-tiny at 64 px and the demo's
text tower; base: ViT-B/16 at 224 px and a BERT of 12 layers and width 768; random weights but for the demo's. Promised:
FLOPs of a step over what is left of it behind the fronts, with captions as long as the longest of a batch, to which
the others are padded. Appends one JSON line a policy to results/reuse.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cached_gradients import count
from transformers import AutoTokenizer, BertConfig, BertModel

from lilt.build import read_split
from lilt.registry import split_top
from lilt.towers import build_tower

RESULTS = Path(__file__).parent / "results" / "reuse.jsonl"
POLICIES = "frozen,lit,last(1),last(2),layernorm(blocks=last:2)"
DEMO_TEXT = Path(__file__).parents[1] / "lilt" / "demo" / "towers" / "text"


def specs(towers: str, folder: Path) -> tuple[str, str]:
    """Return the specs of a pair of towers; those of random weights are made in a folder."""
    if towers == "tiny":
        return "timm:vit_tiny_patch16_224?pretrained=false&image_px=64", f"hf:{DEMO_TEXT}"
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    return "timm:vit_base_patch16_224?pretrained=false", f"hf:{folder}"


def epoch(folder: Path, options: list[str], reuse: str, epochs: int) -> float:
    """Train and return the seconds of an epoch."""
    command = [sys.executable, "-m", "lilt", "train", "--output", str(folder), "--reuse", reuse]
    quiet = ["--val_split", "none", "--test_split", "none", "--augment", "none", "--epochs", str(epochs)]
    subprocess.run([*command, *quiet, *options], check=True, capture_output=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    pairs = int(options[options.index("--max_images") + 1])
    return pairs / float(last["pairs_per_second"])


def padded_length(tokenizer: Any, batch_size: int) -> int:
    """Return how many tokens a caption of the demo takes in a batch, padding included, on average."""
    captions = [sample.captions[0] for sample in read_split("demo", "train")]
    lengths = torch.tensor([len(ids) for ids in tokenizer(captions)["input_ids"]])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    batches = lengths[order].split(batch_size)[:-1]
    return round(statistics.fmean(int(batch.max()) for batch in batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2, help="without reuse")
    parser.add_argument("--times", type=int, default=10, help="as many epochs with it")
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary, RESULTS.open("a", encoding="utf-8") as stream:
        home = Path(temporary)
        vision, text = specs(given.towers, home / "text")
        length = padded_length(AutoTokenizer.from_pretrained(DEMO_TEXT), given.batch_size)
        for policy in split_top(given.policies, ","):
            options = ["--vision", vision, "--text", text, "--policy", policy, "--max_images", str(given.images)]
            options += ["--batch_size", str(given.batch_size), *more]
            off = epoch(home / "off", [*options, "--overwrite"], "off", given.epochs)
            on = epoch(home / "on", [*options, "--overwrite"], "memory", given.times * given.epochs)
            cost = count(policy, build_tower(vision, "vision"), build_tower(text, "text"), given.batch_size, length)
            row: dict[str, Any] = {
                "date": date.today().isoformat(),
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch "
                f"{torch.__version__}",
                "towers": given.towers,
                "policy": policy,
                "options": more,
                "images": given.images,
                "batch_size": given.batch_size,
                "tokens": length,
                "off_s": off,
                "on_s": on,
                "promised": cost.step / (cost.step - cost.fronts),
            }
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            print(
                f"{policy:<28} {off:.2f} s -> {on:.3f} s an epoch: {off / on:.1f} times; {row['promised']:.1f} promised"
            )
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
