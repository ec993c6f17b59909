"""Compare tuning policies on RSICD: one `lilt train` per policy and seed, each in its own process.

LILT_KIT=FOLDER python benchmarks/rsicd.py --policies frozen,layernorm,lora,lilt,full --epochs 8
Appends one JSON line a run to results/rsicd.jsonl; `--collect RUN …` adds runs that are already there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rsicd.jsonl"
SHOWN = (
    "policy",
    "vision_policy",
    "text_policy",
    "epochs",
    "image_px",
    "train_tokens",
    "precision",
    "batch_size",
    "lr",
    "head_lr",
    "augment",
    "seed",
)


def collect(run: Path) -> dict[str, Any]:
    """Read what a finished run wrote about itself."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    contract = json.loads((run / "lilt.json").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    last = records[-1]
    if "result" not in last or "seconds" not in last:
        sys.exit(f"{run} is not finished; go on with: lilt train --config {run}/config.yaml --resume")
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **{name: settings[name] for name in SHOWN},
        "trained": contract["trained"],
        "total": contract["total"],
        "adapter_bytes": (run / "adapter.safetensors").stat().st_size,
        "best_step": last["best_step"],
        "steps": last["step"],
        "val_mean_recall": contract["metrics"]["val/mean_recall"],
        "test": last["result"],
        "seconds": last["seconds"],
        "pairs_per_second": last["pairs_per_second"],
        "peak_bytes": last["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="frozen,layernorm,lora,lilt,full")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--runs", type=Path, default=Path("runs/rsicd"))
    parser.add_argument("--collect", type=Path, nargs="*", default=[])
    given, more = parser.parse_known_args()
    folders: list[Path] = list(given.collect)
    if not folders:
        recipe = HERE.parent / "recipes" / "rsicd.yaml"
        for seed in given.seeds.split(","):
            for policy in given.policies.split(","):
                folder = given.runs / f"{policy}-{seed}"
                options = ["--policy", policy, "--seed", seed, "--epochs", given.epochs, "--output", str(folder), *more]
                command = [sys.executable, "-m", "lilt", "train", "--config", str(recipe), *options]
                subprocess.run(command, check=True)
                folders.append(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as stream:
        for folder in folders:
            row = collect(folder)
            stream.write(json.dumps(row) + "\n")
            print(f"{row['policy']}: test mR {row['test']['mean_recall']:.2f}, validation {row['val_mean_recall']:.2f}")
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
