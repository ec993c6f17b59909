"""The commands; the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from lilt.cli.advise import advise
from lilt.cli.budgets import budgets
from lilt.cli.compare import compare
from lilt.cli.cost import cost
from lilt.cli.evaluate import evaluate
from lilt.cli.merge import merge
from lilt.cli.options import parse_train
from lilt.cli.policies import policies
from lilt.cli.report import report
from lilt.cli.shards import shards
from lilt.cli.train import train
from lilt.registry import nearest

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "policies": policies,
    "budgets": budgets,
    "merge": merge,
    "cost": cost,
    "report": report,
    "compare": compare,
    "shards": shards,
    "advise": advise,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lilt COMMAND …`; user errors go to stderr with status 2 and no traceback.

    Of several processes each leaves their group at the end: what exchanges something afterwards starts another program.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        Console().print(_usage(), highlight=False)
        return 0
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}.{nearest(name, COMMANDS)}")
        status = COMMANDS[name](argv[1:])
        if "torch" in sys.modules:  # which takes seconds to import, and not every answer needs it
            from lilt.distributed import leave

            leave()
        return status
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


__all__ = ["COMMANDS", "main", "parse_train"]
