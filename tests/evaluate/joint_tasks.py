"""A program for `torchrun`: tasks on a model, written to a file by each rank, the same whatever their number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import Accelerator

import lilt
from lilt import distributed
from lilt.evaluate import Setting, evaluate, parse_task

BY_NAME = r"label_from=([a-z]+)\d"
SPECS = (
    f"knn(k=3,{BY_NAME})", f"probe({BY_NAME})", f"zeroshot({BY_NAME},split=train|val)", "drift(samples=7)", "retrieval",
    f"conserve(knn(k=1,{BY_NAME},side=text))", "retrieval(score=late)",
)  # fmt: skip


def main(run: str, data: str, image_root: str, output: str) -> None:
    accelerator = Accelerator()
    setting = Setting(data, image_root, batch_size=2)
    done = evaluate(lilt.load(run), {spec: parse_task(spec) for spec in SPECS}, setting)
    found = {spec: {"values": values, "error": error} for spec, values, error in done}
    name = f"tasks.{accelerator.num_processes}.{accelerator.process_index}.json"
    (Path(output) / name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
