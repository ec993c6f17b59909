"""A program for `torchrun`: runs in which some ranks run out of memory, under the engine that the environment names."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from rich.console import Console

from lilt import distributed
from lilt.config import TrainConfig
from lilt.run import align
from lilt.train import shrink
from lilt.train.engine import make_accelerator
from tests.train.hungry import APPETITE


def main(text: str, pictures: str, output: str) -> None:
    folder = Path(output)
    plain: dict[str, Any] = {
        "vision": "py:tests.train.hungry:vision", "text": text, "policy": "full", "projection": "linear(dim=16)",
        "data": f"{pictures}/manifest.jsonl", "batch_size": 8, "max_steps": 3, "log_every": 1, "workers": 0,
        "train_tokens": 4,  # captions of one length, for pieces are padded each for itself
    }  # fmt: skip

    def run(name: str, **options: Any) -> None:
        APPETITE.refusals.clear()
        AcceleratorState._reset_state(True)
        align(TrainConfig(**plain, **options, output=str(folder / name)), Console(quiet=True))
        everybody = distributed.gather_objects(list(APPETITE.refusals))
        if distributed.is_main():
            (folder / name / "refusals.json").write_text(json.dumps(everybody))

    sharded = make_accelerator("no").is_fsdp2
    run("small", micro_batch=2)
    # where ranks wait for one another in every block they have to run out of memory together
    APPETITE.fits = 2 if sharded or distributed.rank() == 1 else 4
    for where in ("forward", "backward"):
        APPETITE.where = where
        run(where)
    if sharded:
        APPETITE.fits, APPETITE.where = (2 if distributed.rank() == 1 else 4), "forward"
        shrink.LOCKSTEP = timedelta(seconds=5)
        try:
            run("alone")
        except (ValueError, RuntimeError) as error:
            (folder / f"alone.{distributed.rank()}").write_text(str(error))
        os._exit(0)  # the other rank waits for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
