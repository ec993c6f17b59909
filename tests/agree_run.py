"""A program for `torchrun`: the second rank is told something else than the first; what each says is written down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from rich.console import Console

from lilt import distributed
from lilt.config import TrainConfig
from lilt.run import align
from lilt.train.engine import make_accelerator


def main(vision: str, text: str, pictures: str, output: str) -> None:
    folder = Path(output)
    lines = Path(pictures, "manifest.jsonl").read_text().splitlines()
    make_accelerator("no")
    second = distributed.rank() == 1
    if second:
        # the same pictures and the same captions, one of them with another picture
        other = [lines[0].replace("a red picture", "a blue picture"), *lines[1:]]
        (folder / "other.jsonl").write_text("\n".join(other))
    distributed.barrier()
    plain: dict[str, Any] = {
        "vision": vision, "text": text, "projection": "linear(dim=16)", "image_root": pictures,
        "data": f"{pictures}/manifest.jsonl", "batch_size": 6, "max_steps": 1, "workers": 0, "test_split": "none",
    }  # fmt: skip
    cases: dict[str, dict[str, Any]] = {
        "data": {"data": str(folder / "other.jsonl")},
        "settings": {"lr": 1e-4, "batch_size": 4},
        "paths": {"data": f"{pictures}/./manifest.jsonl", "workers": 1},
    }
    for name, theirs in cases.items():
        AcceleratorState._reset_state(True)
        said = "trained"
        try:
            align(
                TrainConfig(**{**plain, **(theirs if second else {}), "output": f"{output}/{name}"}),
                Console(quiet=True),
            )
        except ValueError as error:
            said = str(error)
        (folder / f"{name}.{distributed.rank()}").write_text(said)


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
