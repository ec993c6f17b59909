"""How a step's time and memory grow: with the batch, with the number of pairs, with the number of processes.

python benchmarks/scaling.py [--what batch,pairs,processes] [--batches 64,512] [--pairs 1000,10000] [--processes 1,2]
Each point is a `lilt train` of its own on a synthetic manifest: timm's test_vit at 32 px and the demo's text tower, all
weights trained, micro-batches of 64, the loss in tiles of 2,048. Memory is the peak of the whole process. Appends one
JSON line a point to results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES = 64
OPTIONS = [
    "--vision", "timm:test_vit?pretrained=false&image_px=32", "--text", "demo", "--policy", "full",
    "--same", "negative", "--augment", "none", "--reuse", "off", "--val_split", "none", "--test_split", "none",
    "--log_every", "1", "--loss", "softmax(chunk=2048)", "--micro_batch", "64", "--overwrite", "true",
]  # fmt: skip


def manifest(folder: Path, pairs: int) -> Path:
    """Write a few pictures and a manifest of so many, each with a caption of its own; links make them many."""
    (folder / "pictures").mkdir()
    for number in range(IMAGES):
        Image.effect_noise((32, 32), 10 + number).convert("RGB").save(folder / "pictures" / f"{number}.png")
    colours, shapes = ("red", "green", "blue", "white"), ("circle", "square", "cross", "star")
    file = folder / "manifest.jsonl"
    with file.open("w") as stream:
        for number in range(pairs):
            link = folder / f"{number // IMAGES}"
            if number % IMAGES == 0:
                link.symlink_to(folder / "pictures")
            words = f"a {colours[number % 4]} {shapes[number // 4 % 4]} {number}"
            stream.write(json.dumps({"image": f"{link.name}/{number % IMAGES}.png", "captions": [words]}) + "\n")
    return file


def measure(file: Path, batch: int, processes: int, steps: int, workers: int) -> dict[str, Any]:
    """Train a few steps and return what the run says of itself."""
    output = file.parent / "run"
    command = [sys.executable, "-m", "lilt", "train", *OPTIONS, "--data", str(file), "--output", str(output)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [sys.executable, *torchrun, "-m", "lilt", *command[3:]]
    command += ["--batch_size", str(batch), "--max_steps", str(steps), "--workers", str(workers)]
    began = time.perf_counter()
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower()}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    parts = last["seconds_by_part"]
    return {
        "seconds": seconds,
        "starting_s": parts["starting"],
        "step_s": (parts["steps"] + parts["data"]) / steps,
        "data_s": parts["data"] / steps,
        "pairs_per_second": last["pairs_per_second"],
        "peak_bytes": last["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="batch,pairs,processes")
    parser.add_argument("--batches", default="64,512,4096,32768")
    parser.add_argument("--pairs", default="1000,10000,100000,1000000")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    batches, pairs, processes = (
        [int(n) for n in text.split(",")] for text in (given.batches, given.pairs, given.processes)
    )
    points = {
        "batch": [(max(batches), batch, 1) for batch in batches],
        "pairs": [(count, 256, 1) for count in pairs],
        "processes": [(10_000, 256, count) for count in processes],
    }
    for what in given.what.split(","):
        for count, batch, ranks in points[what]:
            with tempfile.TemporaryDirectory() as folder:
                file = manifest(Path(folder), count)
                steps = given.steps * (1 if batch > 1024 else 10)
                row = {
                    "date": date.today().isoformat(),
                    "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads of "
                    f"{os.cpu_count()} cores, {DEVICE}, torch {torch.__version__}",
                    "what": what, "pairs": count, "batch_size": batch, "processes": ranks, "steps": steps,
                    **measure(file, batch, ranks, steps, given.workers),
                }  # fmt: skip
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(
                {
                    k: row[k]
                    for k in ("what", "pairs", "batch_size", "processes", "step_s", "pairs_per_second", "peak_bytes")
                }
            )
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
