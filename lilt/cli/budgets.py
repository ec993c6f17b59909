"""lilt budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def budgets(argv: Sequence[str]) -> int:
    """Compare what the policies would train and cost, before any weight is read."""
    about = "Compare tuning policies on two towers on the meta device: no weights are read."
    parser = ArgumentParser(prog="lilt budgets", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--vision", default="demo", help="vision tower, as in lilt train")
    parser.add_argument("--text", default="demo", help="text tower")
    parser.add_argument("--policies", default="", help="policies, separated by commas; default: all")
    parser.add_argument("--projection", default="linear(dim=256)", help="the map into the joint space")
    parser.add_argument("--shared", default="none", help="the shared encoder below it, as in lilt train")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per step")
    parser.add_argument("--image_px", type=int, default=0, help="image side; default: the vision tower's own")
    parser.add_argument("--text_tokens", type=int, default=32, help="caption length; open_clip: always the context")
    parser.add_argument("--max_trainable", default="", help="1%% or 2M; sizes not written out are fitted to it")
    parser.add_argument("--max_step", default="", help="most step FLOPs relative to full, such as 0.5")
    parser.add_argument("--max_memory", default="", help="most weights + gradients + AdamW + activations, such as 8GiB")
    parser.add_argument("--sort", default="trainable", help="key of --json to sort by, smallest first")
    parser.add_argument("--plot", default="", help="picture to draw: .png, .pdf or .svg (needs matplotlib)")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the picture")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    # options of this command may be written with dashes too
    given = parse(parser, [re.sub("^--[a-z-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv])
    from lilt.budgets import Request, answer, table

    console = Console(stderr=True)
    found = answer(Request(**{f.name: getattr(given, f.name) for f in fields(Request)}), console)
    if given.json:
        print(json.dumps([asdict(row) for row in found.rows]))
        for spec, reason in found.refused.items():
            console.print(f"{spec}: {reason}", highlight=False, markup=False, soft_wrap=True)
        return 0
    Console().print(table(found, memory=bool(given.max_memory)), highlight=False)
    return 0
