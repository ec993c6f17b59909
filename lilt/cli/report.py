"""lilt report."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def report(argv: Sequence[str]) -> int:
    """Write RUN/report.html: curves, recalls, a gallery, costs, in one file."""
    about = "Write RUN/report.html, one file that holds all it shows (needs matplotlib)."
    parser = ArgumentParser(prog="lilt report", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", help="folder of a checkpoint")
    parser.add_argument(
        "--task", action="append", default=[], help='what to show beside, such as "conserve(knn)"; may be repeated'
    )
    parser.add_argument("--data", default="", help="manifest, or demo; default: the one of the run")
    parser.add_argument("--image_root", default="", help="folder that image paths are relative to")
    parser.add_argument("--split", default="", help="split of the gallery; default: the one the run was tested on")
    parser.add_argument("--gallery", type=int, default=8, help="captions and images to show; 0: none")
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time")
    parser.add_argument("--workers", type=int, default=2, help="data loading processes")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the report that is there")
    given = parse(parser, argv)
    from lilt import distributed
    from lilt.evaluate import Setting, parse_task
    from lilt.report import write_report

    wanted = {spec: parse_task(spec) for spec in given.task}  # all are read before a weight is
    where = given.data or None, given.image_root or None, given.split, given.batch_size, given.workers
    console = Console(stderr=True)
    options = {"searches": given.gallery, "overwrite": given.overwrite}
    done = write_report(given.run, wanted, Setting(*where), console, **options)
    if not distributed.is_main():
        return 2 if done.failed else 0
    size = done.file.stat().st_size / 2**20
    Console().print(f"{done.file} ({size:.1f} MiB)", highlight=False, markup=False, soft_wrap=True)
    for part, reason in done.missing.items():
        console.print(f"not shown: {part}: {reason}", highlight=False, markup=False, soft_wrap=True)
    for spec, error in done.failed.items():
        said = f"lilt: {spec} failed: {error}"
        console.print(said, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 2 if done.failed else 0
