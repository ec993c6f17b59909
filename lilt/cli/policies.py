"""lilt policies."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from lilt.cli.options import parse


def policies(argv: Sequence[str]) -> int:
    """List the tuning policies, what they train and what they can do."""
    parser = ArgumentParser(prog="lilt policies", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = parse(parser, argv)
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
