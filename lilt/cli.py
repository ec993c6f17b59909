"""The commands; the only place that prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import jsonargparse
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from lilt.config import TrainConfig
from lilt.registry import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lilt COMMAND …`; user errors go to stderr with status 2 and no traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        Console().print(_usage(), highlight=False)
        return 0
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}.{nearest(name, COMMANDS)}")
        return COMMANDS[name](argv[1:])
    except (ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        console.print("stopped", style="bold red")
        return 130
    console.print(f"lilt: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 2


def _usage() -> str:
    lines = "\n".join(f"  {name:<10}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items())
    return f"usage: lilt COMMAND \\[options]   (lilt COMMAND --help lists the options)\n\n{lines}"


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse; a complaint about an unknown option names the nearest known one."""
    try:
        return parser.parse_args(_switches(argv))
    except jsonargparse.ArgumentError as error:
        message = str(error)
    found = re.search(r"[Uu]nrecognized arguments?: -*([\w-]+)|(?:[Kk]ey|Option) ['\"]?(\w+)['\"]? is not", message)
    if found is None:
        raise ValueError(message)
    key = (found[1] or found[2]).replace("-", "_")
    known = parser.get_defaults().keys()
    raise ValueError(f"unknown option {key!r}; {parser.prog} --help lists all.{nearest(key, known)}")


def _switches(argv: Sequence[str]) -> list[str]:
    """Read `--resume` alone as `--resume true`."""
    following = [*argv[1:], ""][: len(argv)]
    alone = [
        a in ("--resume", "--overwrite") and b not in ("true", "false") for a, b in zip(argv, following, strict=True)
    ]
    return [f"{a}=true" if bare else a for a, bare in zip(argv, alone, strict=True)]


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """Parse the options of `lilt train`; a --config file is overridden by what follows it."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="lilt train", description="Align two towers.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe (.yaml)")
    parser.add_class_arguments(TrainConfig, as_group=False)
    given = _parse(parser, argv)
    return TrainConfig(**{f.name: getattr(given, f.name) for f in fields(TrainConfig)})


def train(argv: Sequence[str]) -> int:
    """Align two towers by training few of their parameters."""
    config = parse_train(argv)
    # torch and the libraries take seconds to import: the spelling of an option is checked before
    from lilt import distributed
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
    console.print(_report_table(report))
    if report.outcome.bad_images:
        console.print(f"{report.outcome.bad_images} images could not be read; see {report.folder / 'bad_images.jsonl'}")
    return 0


def _report_table(report: Any) -> Table:
    place = report.outcome.place
    table = Table("", "before", "after", title="test split" if report.after else "no test split")
    for side, title in (("text_to_image", "text→image"), ("image_to_text", "image→text")):
        for metric in ("R@1", "R@5", "R@10", "median_rank") if report.after else ():
            cells = [f"{result[side][metric]:.2f}" if result else "-" for result in (report.before, report.after)]
            table.add_row(f"{title} {metric}", *cells)
    if report.after:
        before = f"{report.before['mean_recall']:.2f}" if report.before else "-"
        table.add_row("mean recall", before, f"{report.after['mean_recall']:.2f}")
        for name, value in report.references.items():
            table.add_row(name, "", f"{value:.2f}")
        chance = 100 / report.after["num_images"]
        table.add_row("text→image R@1 of chance", "", f"{chance:.2f}", end_section=True)
    table.add_row("trained values", "", f"{report.trained:,} ({100 * report.trained / report.total:.2f} %)")
    table.add_row("best step (by validation)", "", f"{place.best_step} of {report.outcome.steps}")
    table.add_row("seconds", "", f"{report.outcome.meter.total:.1f}")
    table.add_row("pairs per second", "", f"{report.outcome.pairs_per_second:.1f}")
    table.add_row("peak memory", "", f"{report.outcome.peak_bytes / 2**20:,.0f} MiB")
    table.add_row("adapter file", "", f"{report.adapter_bytes / 2**20:.2f} MiB")
    table.add_row("written to", "", str(report.folder))
    return table


def evaluate(argv: Sequence[str]) -> int:
    """Measure the retrieval recalls of a checkpoint on a split."""
    parser = ArgumentParser(prog="lilt evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", help="folder of a checkpoint")
    parser.add_argument("--data", default="", help="manifest, or demo; default: the one of the run")
    parser.add_argument("--image_root", default="", help="folder that image paths are relative to")
    parser.add_argument("--split", default="test", help="split to evaluate")
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time")
    parser.add_argument("--workers", type=int, default=2, help="data loading processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = _parse(parser, argv)
    from lilt.run import evaluate_folder

    data, root = given.data or None, given.image_root or None
    console = Console(stderr=True)
    options = {"batch_size": given.batch_size, "workers": given.workers}
    result = evaluate_folder(given.run, data, root, given.split, console, **options)
    if given.json:
        print(json.dumps(result))
        return 0
    table = Table("", "text→image", "image→text", title=f"{given.run}, {given.split}")
    for metric in result["text_to_image"]:
        table.add_row(metric, *(f"{result[side][metric]:.2f}" for side in ("text_to_image", "image_to_text")))
    table.add_row("mean recall", f"{result['mean_recall']:.2f}", "", end_section=True)
    for key in ("num_images", "num_captions", "num_unreadable", "num_cut_captions"):
        table.add_row(key.removeprefix("num_").replace("_", " "), f"{result[key]:,}", "")
    Console().print(table)
    return 0


def policies(argv: Sequence[str]) -> int:
    """List the tuning policies, what they train and what they can do."""
    parser = ArgumentParser(prog="lilt policies", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = _parse(parser, argv)
    from lilt.policies import catalogue

    rows = catalogue()
    if given.json:
        print(json.dumps(rows))
        return 0
    table = Table("policy", "what it trains", "lr", "starts as pretrained", "merges", show_lines=True)
    for row in rows:
        marks = ["" if row[k] is None else "yes" if row[k] else "no" for k in ("identity_at_start", "mergeable")]
        table.add_row(row["spec"], row["about"], "" if row["lr"] is None else f"{row['lr']:g}", *marks)
    Console().print(table)
    return 0


def merge(argv: Sequence[str]) -> int:
    """Write a run between the base towers and the tuned ones."""
    about = "Write a run whose towers stand at base + scale * (tuned - base); the heads stay as trained."
    parser = ArgumentParser(prog="lilt merge", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", help="folder of a checkpoint")
    parser.add_argument("--scale", type=float, required=True, help="0: the base towers, 1: the tuned ones")
    parser.add_argument("--output", default="", help="new folder; default: RUN-scaleS")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the checkpoint in the output folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = _parse(parser, argv)
    from lilt.train.folder import merge_folder

    result = merge_folder(given.run, given.scale, given.output or None, given.overwrite)
    if given.json:
        print(json.dumps(result))
        return 0
    said = f"{result['run']} at scale {result['scale']:g} is in {result['output']}"
    Console().print(said, highlight=False, markup=False, soft_wrap=True)
    return 0


def budgets(argv: Sequence[str]) -> int:
    """Compare what the policies would train and cost, before any weight is read."""
    about = "Compare tuning policies on two towers on the meta device: no weights are read."
    parser = ArgumentParser(prog="lilt budgets", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--vision", default="demo", help="vision tower, as in lilt train")
    parser.add_argument("--text", default="demo", help="text tower")
    parser.add_argument("--policies", default="", help="policies, separated by commas; default: all")
    parser.add_argument("--projection", default="linear(dim=256)", help="the map into the joint space")
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
    given = _parse(parser, [re.sub("^--[a-z-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv])
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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "policies": policies,
    "budgets": budgets,
    "merge": merge,
}
