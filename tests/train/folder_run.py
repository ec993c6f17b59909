"""A program for `torchrun`: ranks find, open and lose a run folder together; what each has seen is written down."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lilt import distributed
from lilt.config import TrainConfig
from lilt.train.engine import make_accelerator
from lilt.train.folder import check_folder, new_folder, open_folder


def main(output: str) -> None:
    os.chdir(output)
    make_accelerator("no")
    folder, seen = Path("run"), {}
    seen["names"] = [new_folder(TrainConfig(policy="bitfit")) for _ in range(2)]
    for how in ("overwrite", "resume"):
        config = TrainConfig(output="run", **{how: True})  # type: ignore[arg-type]
        mark = check_folder(config, folder)
        if distributed.is_main():
            time.sleep(1)  # the other rank comes first
        open_folder(config, folder, mark)
        seen[how] = sorted(file.name for file in folder.iterdir())
        distributed.barrier()
        if distributed.is_main():
            (folder / "spill-0").mkdir()
            (folder / "spill-0" / "0.bin").touch()
        distributed.barrier()
    seen["taken"] = taken(TrainConfig(output="mine"), Path("mine"))
    Path(f"seen.{distributed.rank()}").write_text(json.dumps(seen))


def taken(config: TrainConfig, folder: Path) -> Any:
    """Return what a run says whose folder another one takes while it is built."""
    mark = check_folder(config, folder)
    if distributed.is_main():
        folder.mkdir()
        (folder / "config.yaml").touch()
    distributed.barrier()
    try:
        open_folder(config, folder, mark)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
