"""lilt train."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lilt.cli.options import parse_train


def train(argv: Sequence[str]) -> int:
    """Align two towers by training few of their parameters."""
    config = parse_train(argv)
    # torch and the libraries take seconds to import: the spelling of an option is checked before
    from lilt import distributed
    from lilt.report import report_table
    from lilt.run import align
    from lilt.train.folder import CONFIG

    console = Console()
    report = align(config, console)
    if not distributed.is_main():
        return 0
    if not report.outcome.finished:
        place = report.outcome.place
        console.print(f"stopped at step {place.step}/{report.outcome.steps}; everything is saved. Go on with:")
        console.print(f"  lilt train --config {report.folder / CONFIG} --resume", highlight=False, soft_wrap=True)
        return 130
    console.print(report_table(report))
    if report.outcome.bad_images:
        console.print(f"{report.outcome.bad_images} images could not be read; see {report.folder / 'bad_images.jsonl'}")
    return 0
