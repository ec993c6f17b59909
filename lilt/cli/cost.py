"""lilt cost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from rich.console import Console

from lilt.cli.options import parse, train_config, train_parser


def cost(argv: Sequence[str]) -> int:
    """Say what published systems cost, what runs cost, or what a planned run will."""
    about = "Published systems; finished runs; or, with options of lilt train, a planned run by some of its steps."
    parser = train_parser("lilt cost", about)
    parser.add_argument("runs", nargs="*", default=[], help="folders of finished runs")
    parser.add_argument("--steps", type=int, default=20, help="steps of the planned run to measure")
    parser.add_argument("--gpus", type=int, default=1, help="processes of the planned run; one is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = parse(parser, argv)
    planned = [a for a in argv if a.startswith("--") and not re.fullmatch("--(json|price)(=.*)?", a)]
    if planned and given.runs:
        raise ValueError(f"{planned[0]} is about a planned run, {given.runs[0]} is a finished one; ask for one of them")
    from lilt.cost import estimate, published, read_run, table

    if planned:
        config = train_config(given)
        entries = [estimate(config, steps=given.steps, gpus=given.gpus, console=Console(stderr=True))]
    else:
        entries = [read_run(run, given.price) for run in given.runs] or published(given.price)
    if given.json:
        print(json.dumps([entry.record() for entry in entries]))
        return 0
    Console().print(table(entries), highlight=False)
    return 0
