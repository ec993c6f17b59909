"""lilt merge."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def merge(argv: Sequence[str]) -> int:
    """Write a run between the base towers and the tuned ones."""
    about = "Write a run whose towers stand at base + scale * (tuned - base); the heads stay as trained."
    parser = ArgumentParser(prog="lilt merge", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", help="folder of a checkpoint")
    parser.add_argument("--scale", type=float, required=True, help="0: the base towers, 1: the tuned ones")
    parser.add_argument("--output", default="", help="new folder; default: RUN-scaleS")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the checkpoint in the output folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parse(parser, argv)
    from lilt.train.folder import merge_folder

    result = merge_folder(given.run, given.scale, given.output or None, given.overwrite)
    if given.json:
        print(json.dumps(result))
        return 0
    said = f"{result['run']} at scale {result['scale']:g} is in {result['output']}"
    Console().print(said, highlight=False, markup=False, soft_wrap=True)
    return 0
