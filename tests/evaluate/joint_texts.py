"""A program for `torchrun`: tasks on texts, in columns and of fine-tuning, written to a file by each rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import lilt
from lilt import distributed
from lilt.evaluate import Setting, evaluate, parse_task
from lilt.evaluate.rows import Advance

BY_NAME = r"label_from=([a-z]+)\d"


def specs(folder: str) -> list[str]:
    """Return what is done with the files of a folder."""
    return [
        f"text_probe(data={folder}/sst,test=dev)",
        f"similarity(data={folder}/sts,split=dev)",
        "retrieval(columns=captions|second)",
        f"finetune(side=text,data={folder}/sst,test=dev,epochs=2,policy=lora(r=2))",
        f"finetune({BY_NAME},epochs=2,batch_size=4,augment=hflip)",
        f"conserve(text_probe(data={folder}/sst,test=dev))",
        f"score_finetune(data={folder}/sts,test=dev,epochs=2,batch_size=4,policy=full)",
    ]


def main(run: str, data: str, image_root: str, folder: str) -> None:
    accelerator = Accelerator()
    bars: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def bar(name: str, total: int) -> Iterator[Advance]:
        bars.append((name, total, []))
        yield bars[-1][2].append

    setting = Setting(data, image_root, batch_size=2, bar=bar)
    done = evaluate(lilt.load(run), {spec: parse_task(spec) for spec in specs(folder)}, setting)
    found: dict[str, Any] = {spec: {"values": values, "error": error} for spec, values, error in done}
    found["bars"] = [(name, total, sum(moves)) for name, total, moves in bars]
    name = f"texts.{accelerator.num_processes}.{accelerator.process_index}.json"
    (Path(folder) / name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
