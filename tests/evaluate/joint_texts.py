"""A program for `torchrun`: tasks on texts, in columns and of fine-tuning, written to a file by each rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import Accelerator

import lilt
from lilt.evaluate import Setting, evaluate, parse_task

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
    ]


def main(run: str, data: str, image_root: str, folder: str) -> None:
    accelerator = Accelerator()
    setting = Setting(data, image_root, batch_size=2)
    done = evaluate(lilt.load(run), {spec: parse_task(spec) for spec in specs(folder)}, setting)
    found = {spec: {"values": values, "error": error} for spec, values, error in done}
    name = f"texts.{accelerator.num_processes}.{accelerator.process_index}.json"
    (Path(folder) / name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
