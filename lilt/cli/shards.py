"""lilt shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lilt.cli.options import parse


def shards(argv: Sequence[str]) -> int:
    """Pack a split of a manifest into WebDataset tars."""
    about = "Write shards to train on; the same command goes on where it was stopped."
    parser = ArgumentParser(prog="lilt shards", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--data", default="demo", help="manifest, hf:NAME_OR_FOLDER, or demo")
    parser.add_argument("--image_root", default="", help="folder that image paths are relative to")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--split", default="train", help="split to pack")
    parser.add_argument("--per_shard", type=int, default=1000, help="images in a shard")
    parser.add_argument("--image_px", type=int, default=0, help="largest shorter side in pixels; default: as they are")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the shards in the output folder")
    given = parse(parser, argv)
    from rich.progress import Progress

    from lilt.build import read_split
    from lilt.data import pack

    samples = read_split(given.data, given.split, given.image_root or None)
    options = {"per_shard": given.per_shard, "image_px": given.image_px or None, "overwrite": given.overwrite}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("packing", total=len(samples))
        done = pack(samples, Path(given.output), advance=lambda count: progress.advance(bar, count), **options)
    Console().print(done.report(), highlight=False, markup=False, soft_wrap=True)
    return 0
