"""The second system in parts: what a teacher, a shared encoder, a policy and the batch do on RSICD.

LILT_KIT=FOLDER python benchmarks/distillation.py [--studies teacher,shared,policy,batch,heads] [--seeds 0,1]
Each run is recipes/rsicd_liteitr.yaml with some settings changed, in its own process; a run that is in
results/distillation.jsonl already is passed over. All runs see the same number of pairs, so that larger batches have
fewer steps, and their rate grows with the square root of the batch. Measured at the end, compared on validation.
Options of `lilt train` are handed on. Needs hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rsicd import collect

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "distillation.jsonl"
RECIPE = HERE.parent / "recipes" / "rsicd_liteitr.yaml"
PAIRS, BATCH, LR = 8704, 64, 3e-4  # a pass over all images; the batch and the rate that the others are measured from
NONE = {"teacher": "null", "distill": "contrastive"}
# `kl` compares classes, so its teacher keeps its classifier
STUDIES: dict[str, dict[str, dict[str, str]]] = {
    "teacher": {
        "none": NONE,
        "contrastive": {"distill": "contrastive(temperature=0.07,bank=0)"},
        "contrastive, bank of 4096": {},
        "mse": {"distill": "mse"},
        "cosine": {"distill": "cosine"},
        "relational": {"distill": "relational"},
        "kl": {"distill": "kl"},
    },
    "shared": {
        "none": {**NONE, "shared": "none", "projection": "linear(dim=256)"},
        "mlp": {**NONE, "shared": "mlp"},
        "transformer(n=1)": NONE,
    },
    "heads": {
        "linear": {**NONE, "shared": "none", "projection": "linear(dim=256)"},
        "glu": {**NONE, "shared": "none", "projection": "glu(expansion=4)"},
        "tokens": {**NONE, "shared": "none", "projection": "tokens"},
    },
    "policy": {
        "full": NONE,
        "layernorm": {**NONE, "policy": "layernorm", "lr": "5e-3"},
        "lora": {**NONE, "policy": "lora", "lr": "3e-3"},
        "lora, contrastive with bank": {"policy": "lora", "lr": "3e-3"},
    },
    "batch": {f"{size}": {**NONE, "batch_size": f"{size}"} for size in (32, 64, 128, 256, 512)},
}


def options_of(settings: dict[str, str], seed: str) -> list[str]:
    """Return the options of a run: the same number of pairs in all of them."""
    batch = int(settings.get("batch_size", BATCH))
    steps = PAIRS // batch
    plain = {"batch_size": f"{batch}", "lr": f"{LR * math.sqrt(batch / BATCH):.3g}", "max_steps": f"{steps}"}
    # in passes: never before the end
    merged = {**plain, "eval_every": f"{steps}", "seed": seed, **settings}
    return [word for name, value in merged.items() for word in (f"--{name}", value)]


def done() -> set[tuple[str, ...]]:
    """Return the keys of the runs that are recorded."""
    if not RESULTS.is_file():
        return set()
    return {tuple(json.loads(line)["key"]) for line in RESULTS.read_text().splitlines()}


def main() -> None:
    """Run what is missing and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument("--only", default="", help="do what has this in its name")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    given, more = parser.parse_known_args()
    os.environ["LILT_KIT"]  # the recipe reads it: fail early
    for seed in given.seeds.split(","):
        for study in given.studies.split(","):
            for name, settings in STUDIES[study].items():
                options = options_of(settings, seed)
                key = (*options, *more)
                if key in done() or given.only not in name:
                    continue
                folder = given.runs / "".join(c if c.isalnum() else "_" for c in f"{study}-{name}-{seed}")
                command = [sys.executable, "-m", "lilt", "train", "--config", str(RECIPE), "--overwrite", "true"]
                subprocess.run([*command, "--output", str(folder), *options, *more], check=True)
                row: dict[str, Any] = {"key": key, "options": options, "study": study, "name": name} | collect(folder)
                with RESULTS.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"{study}: {name}, seed {seed}: validation {row['val_mean_recall']:.2f}")
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
