"""A training step beside those of other libraries: the same towers, batch, optimizer and clipping, in one run.

python benchmarks/peers.py [--size tiny|base] [--batch_size 64] [--pieces 4] [--rounds 10]; needs sentence-transformers
open_clip: its own train_one_epoch, in pieces with accum_freq. VisionTextDualEncoder of transformers, with peft for
LoRA: a plain loop. sentence-transformers: its MultipleNegativesRankingLoss in both directions, cached for pieces, in
a plain loop. All ways of a group take turns and the median counts; peak memory is of a process that does nothing
else; error is the largest difference of a gradient in pieces from the one in one piece, over the largest entry of
that, per tensor, without dropout. Synthetic batch, random weights. Appends one JSON line a way to
results/peers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from peer_ways import GROUPS, Pairs, Shape, Way, make_batch

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"


def error(way: Way, batch: Pairs) -> float | None:
    """Return how far the gradient in pieces is from the exact one; None for a way that takes one piece."""
    if way.pieces == 1:
        return None
    for module in way.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    exact = {name: gradient.clone() for name, gradient in way.gradient(batch, 1).items()}
    found = way.gradient(batch, way.pieces)
    worst = 0.0
    for name, gradient in exact.items():
        largest = gradient.abs().max()
        if largest > 1e-7:  # what has no gradient in theory has noise alone
            worst = max(worst, float((found[name] - gradient).abs().max() / largest))
    return worst


def memory(group: str, name: str, shape: Shape) -> int:
    """Return the bytes that steps of a way take beyond its weights, in a process of its own."""
    command = [sys.executable, __file__, "--alone", group, name, "--size", shape.size]
    command += ["--batch_size", str(shape.rows), "--pieces", str(shape.pieces)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(group: str, name: str, shape: Shape) -> None:
    """Do steps of one way and say what they took."""
    way, batch = GROUPS[group][name](shape), make_batch(shape)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        twice(way, batch)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = psutil.Process().memory_info().rss
    twice(way, batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def twice(way: Way, batch: Pairs) -> None:
    """Do two steps: from the second on an optimizer has its moments."""
    for _ in range(2):
        way.step(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="tiny")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--groups", default=";".join(GROUPS), help="parted by ;")
    parser.add_argument("--alone", nargs=2)
    given = parser.parse_args()
    shape = Shape(given.size, given.batch_size, given.pieces)
    if given.alone:
        alone(given.alone[0], given.alone[1], shape)
        return
    batch = make_batch(shape)
    for group in given.groups.split(";"):
        ways = {name: make(shape) for name, make in GROUPS[group].items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(given.rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way.step(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # the first is not like the others
                    seconds[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, way in ways.items():
            row = {
                "date": date.today().isoformat(),
                "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads of "
                f"{os.cpu_count()} cores, {'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}",
                "versions": {
                    p: version(p) for p in ("open_clip_torch", "transformers", "peft", "sentence-transformers")
                },
                "group": group,
                "way": name,
                "size": shape.size,
                "batch_size": shape.rows,
                "pieces": way.pieces,
                "pairs_per_second": shape.rows / median[name],
                "lilt_over_this": median[name] / median["lilt"],
                "peak_bytes": memory(group, name, shape),
                "file_bytes": way.file_bytes(),
                "gradient_error": error(way, batch),
                "rounds": given.rounds,
            }
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print({key: row[key] for key in ("group", "way", "pairs_per_second", "lilt_over_this", "gradient_error")})
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
