"""lilt compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def compare(argv: Sequence[str]) -> int:
    """Put several runs side by side, and models as they are: what each trained, found and took.

    Folders without a checkpoint (a run that has just begun, a cache) are left out and named: RUN is often runs/*.
    """
    about = (
        "One row a run, the fewest trained values first; nothing is evaluated, the numbers are those of the runs. "
        "A model as it is: lilt evaluate open_clip:ViT-B-32@openai --data MANIFEST --json > clip.json, "
        'then lilt compare RUN clip.json. What the towers have kept: lilt evaluate RUN --task "conserve(knn)" --json > '
        "kept.json, then lilt compare kept.json"
    )
    parser = ArgumentParser(prog="lilt compare", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "runs",
        nargs="+",
        help="folders of checkpoints, or what evaluate --json printed, of tasks too; held against the first",
    )
    parser.add_argument("--split", default="test", help="whose recalls: test, or val, which chose the checkpoints")
    parser.add_argument("--plot", default="", help="picture to draw: .png, .pdf or .svg (needs matplotlib)")
    parser.add_argument("--html", default="", help="page to write, plot and table in one file (needs matplotlib)")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the picture and the page")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = parse(parser, argv)
    from lilt.budgets.plot import check_plot
    from lilt.checkpoint import CONTRACT
    from lilt.report import check_drawable, check_page, compare_page, compare_plot, compare_runs, compare_table

    runs = [run for run in given.runs if not Path(run).is_dir() or (Path(run) / CONTRACT).exists()] or given.runs
    empty = [run for run in given.runs if run not in runs]
    plot = check_plot(given.plot, given.overwrite) if given.plot else None
    html = check_page(given.html, given.overwrite) if given.html else None
    rows = compare_runs(runs, given.split)
    for path, write in ((plot, compare_plot), (html, compare_page)):
        if path is not None:
            check_drawable(rows, given.split)
            write(rows, given.split, path)
    if empty:
        said = f"left out, for no checkpoint is in them: {', '.join(empty)}"
        Console(stderr=True).print(said, highlight=False, markup=False, soft_wrap=True)
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    console = Console()
    console.print(compare_table(rows, given.split, console.width), highlight=False)
    return 0
