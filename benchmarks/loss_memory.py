"""Memory and time of a loss and its gradient, full and chunked, beyond the embeddings: is it linear in the batch?

OMP_NUM_THREADS=1 python benchmarks/loss_memory.py --rows 1024,4096,32768 --chunk 2048
Each measurement is a process of its own: the peak of its memory (on Linux; or of the accelerator) above what it held
when the embeddings were there and the libraries warm, so the gradients of both embeddings are in it. fp32, random unit
rows, every 8th image twice. Seconds are of the processor (on an accelerator: wall). Appends one JSON line a measurement
to results/loss_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.losses import Loss, Relation, build_loss

RESULTS = Path(__file__).parent / "results" / "loss_memory.jsonl"


class Run:
    """One batch, from its embeddings to their gradient."""

    def __init__(self, loss: Loss, rows: int, dim: int, device: str):
        self.loss = loss
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = (
            F.normalize(torch.randn(rows, dim, generator=generator), dim=-1).to(device).requires_grad_()
            for _ in range(2)
        )
        own = torch.arange(rows, device=device)
        valid = torch.ones(rows, dtype=torch.bool, device=device)
        self.relation = Relation(own.where(own % 8 > 0, own + 1), own, valid)
        self.scale = self._scalar(loss.scale_start, device)
        self.bias = self._scalar(loss.bias_start, device)

    @staticmethod
    def _scalar(start: float | None, device: str) -> Tensor | None:
        return None if start is None else torch.tensor(start, device=device, requires_grad=True)

    def __call__(self) -> None:
        rows = slice(0, len(self.image))
        self.loss(self.image, self.text, self.scale, self.bias, rows=rows, relation=self.relation)[0].backward()


def held(device: str, peak: bool) -> int:
    """Return the bytes that are held now, or the most since the last `forget`."""
    if device != "cpu":
        module = torch.get_device_module(device)
        return int(module.max_memory_allocated() if peak else module.memory_allocated())
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget(device: str) -> None:
    """Start a new peak."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.get_device_module(device).reset_peak_memory_stats()


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def measure(spec: str, rows: int, dim: int, device: str) -> dict[str, float]:
    """Measure one loss in this process."""
    loss = build_loss(spec)
    Run(replace(loss, chunk=loss.chunk and 32), 64, dim, device)()
    run = Run(loss, rows, dim, device)
    forget(device)
    before, began = held(device, peak=False), now(device)
    run()
    seconds = now(device) - began
    return {"peak_mib": round((held(device, peak=True) - before) / 2**20, 1), "seconds": round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="softmax,sigmoid,hinge")
    parser.add_argument("--rows", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--full_rows", type=int, default=8192, help="largest batch for the full form")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child process: one loss with its chunk, and one batch size
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, int(given.rows), given.dim, given.device)))
        return
    device = torch.get_device_module(given.device).get_device_name() if given.device != "cpu" else "CPU"
    about = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    machine = {"date": date.today().isoformat(), "machine": f"{about}, torch {torch.__version__}", "device": device}
    print(f"{'loss':<10}{'rows':>7}{'chunk':>7}{'MiB':>10}{'seconds':>10}")
    for name in given.losses.split(","):
        for rows in map(int, given.rows.split(",")):
            for chunk in (None, given.chunk):
                if chunk is None and rows > given.full_rows:
                    continue
                child = [sys.executable, __file__, "--one", f"{name}(chunk={chunk})", "--rows", str(rows)]
                child += ["--dim", str(given.dim), "--device", given.device]
                done = subprocess.run(child, capture_output=True, text=True, check=True)
                line: dict[str, Any] = {"loss": name, "rows": rows, "dim": given.dim, "chunk": chunk}
                line |= json.loads(done.stdout)
                print(f"{name:<10}{rows:>7}{chunk or '-':>7}{line['peak_mib']:>10.1f}{line['seconds']:>10.2f}")
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(machine | line) + "\n")


if __name__ == "__main__":
    main()
