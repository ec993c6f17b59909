"""lilt advise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def advise(argv: Sequence[str]) -> int:
    """Rank pairs of towers, and layers of them, by how alike they see images and captions before any training."""
    about = "Rank pairs of towers by mutual nearest neighbours and CKA on some thousand pairs; predict their step."
    parser = ArgumentParser(prog="lilt advise", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--vision", action="append", default=[], help="vision tower, may be repeated; default: demo")
    parser.add_argument("--text", action="append", default=[], help="text tower, may be repeated; default: demo")
    parser.add_argument("--data", default="demo", help="manifest, hf: dataset, or demo")
    parser.add_argument("--image_root", default="", help="folder that image paths are relative to")
    parser.add_argument("--split", default="train", help="split to look at; not the one that is reported")
    parser.add_argument(
        "--pairs", type=int, default=0, help="images, each with a caption of its own; default: up to 2000"
    )
    parser.add_argument("--k", type=int, default=10, help="nearest neighbours")
    parser.add_argument("--layers", default="all", help="all: each block of each tower; last: the outputs alone")
    parser.add_argument("--policy", default="layernorm", help="what would be trained, see lilt policies")
    parser.add_argument("--image_px", type=int, default=0, help="image side; default: each vision tower's own")
    parser.add_argument("--text_tokens", type=int, default=32, help="caption length, in tokens")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs at a time, and those of the step")
    parser.add_argument("--workers", type=int, default=2, help="data loading processes")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = parse(parser, argv)
    from lilt import advise as advising

    asked = {f.name: getattr(given, f.name) for f in fields(advising.Question)}
    towers = {side: tuple(asked[side]) or ("demo",) for side in ("vision", "text")}
    question = advising.Question(**{**asked, **towers, "image_root": given.image_root or None})
    console = Console(stderr=True)
    rows: list[Any] = []
    failed = 0
    try:
        for found in advising.advise(question, console):
            if isinstance(found, advising.Advice):
                rows.append(found)
                continue
            failed += 1
            said = f"lilt: {found.tower} failed: {found.error}"
            console.print(said, style="bold red", highlight=False, markup=False, soft_wrap=True)
    finally:  # what was found before Ctrl-C or an error stands
        _show(advising.ranked(rows), given.json)
    return 2 if failed else 0


def _show(rows: list[Any], as_json: bool) -> None:
    from lilt.advise import table

    if as_json and rows:
        print(json.dumps([asdict(row) for row in rows]))
    elif rows:
        Console().print(table(rows), highlight=False)
