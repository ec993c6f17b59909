"""lilt evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from lilt.cli.options import parse


def evaluate(argv: Sequence[str]) -> int:
    """Measure what a checkpoint or an off-the-shelf model can do: retrieval, or the tasks of --task."""
    parser = ArgumentParser(prog="lilt evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", help="folder of a checkpoint; or open_clip:ARCH@TAG, hf:NAME_OR_FOLDER")
    parser.add_argument(
        "--task", action="append", default=[], help="such as knn(k=20), may be repeated; default: recalls as a table"
    )
    parser.add_argument("--data", default="", help="manifest, or demo; default: the one of the run, if it is a run")
    parser.add_argument("--image_root", default="", help="folder that image paths are relative to")
    parser.add_argument("--split", default="test", help="split to evaluate")
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time")
    parser.add_argument("--workers", type=int, default=2, help="data loading processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as lilt compare takes it")
    given = parse(parser, argv)
    from lilt import distributed
    from lilt.evaluate import Setting
    from lilt.evaluate.table import recall_table
    from lilt.run import evaluate_folder

    where = given.data or None, given.image_root or None, given.split
    options: dict[str, Any] = {"batch_size": given.batch_size, "workers": given.workers}
    console = Console(stderr=True)
    if given.task:
        return _do_tasks(given, Setting(*where, **options), console)
    result = evaluate_folder(given.run, *where, console, **options)
    if distributed.is_main() and given.json:
        print(json.dumps(result))  # `lilt compare` reads it
    elif distributed.is_main():
        Console().print(recall_table(result, f"{given.run}, {given.split}"))
    return 0


def _do_tasks(given: Namespace, setting: Any, console: Console) -> int:
    """Do tasks one after the other and show each as it ends; status 2 when one failed, with what it had found."""
    from lilt import distributed
    from lilt.evaluate import Finished, parse_task
    from lilt.evaluate.table import task_table
    from lilt.run import evaluate_tasks

    wanted = {spec: parse_task(spec) for spec in given.task}  # all are read before a weight is
    done: list[Finished] = []
    try:
        for finished in evaluate_tasks(given.run, wanted, setting, console):
            done.append(finished)
            if distributed.is_main() and finished.values and not given.json:
                Console().print(task_table(finished))
    finally:  # hours of work are not lost to Ctrl-C in the last task
        failed = {spec: error for spec, _, error in done if error is not None}
        if distributed.is_main() and done and given.json:
            print(json.dumps({"run": given.run, "tasks": {d.spec: d.values for d in done}, "failed": failed}))
        for spec, error in failed.items() if distributed.is_main() else ():
            said = f"lilt: {spec} failed: {error}"
            console.print(said, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 2 if failed else 0
