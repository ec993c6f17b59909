"""Try every policy on every tower family of the tests, and with --long every composition of two.

python benchmarks/support.py [--long]
A pair is refused before anything is changed, or it is applied and each of its trained tensors is proved to move the
output. Writes one JSON line a pair to results/support.jsonl, one a composition to support_long.jsonl; needs no GPU and
no weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the families are those of the tests

from lilt.policies import aliases, check_alive, parse_policy  # noqa: E402
from tests.policies.conformance import SPECS, planned, tuned  # noqa: E402
from tests.towers.families import FAMILIES, tiny  # noqa: E402


def attempt(spec: str, family: str) -> dict[str, Any]:
    """Say how one policy fares on one family: ok with its count, or refused or dead with the reason."""
    tower = tiny(family)
    row: dict[str, Any] = {"policy": spec, "family": family, "side": tower.side}
    try:
        parts = parse_policy(spec, tower.side)
        count = planned(spec, tower).trained
    except ValueError as error:
        return row | {"verdict": "refused", "reason": str(error)}
    try:
        check_alive(tuned(spec, tower, alive=False))
    except ValueError as error:
        return row | {"verdict": "dead", "reason": str(error)}
    return row | {"verdict": "ok", "trained": count, "mergeable": all(part.mergeable for part in parts)}


def families_of(spec: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return on which families a composition works, is refused or is dead."""
    ours = [row for row in rows if row["policy"] == spec]
    verdicts = ("ok", "refused", "dead")
    return {"policy": spec} | {v: [row["family"] for row in ours if row["verdict"] == v] for v in verdicts}


def main() -> None:
    """Try all pairs and say how many of them work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--long", action="store_true", help="compositions of two instead of single policies")
    long = parser.parse_args().long
    specs = SPECS
    if long:
        plain = [spec for spec in SPECS if spec not in (*aliases, "frozen") and "+" not in spec]
        specs = [f"{one}+{other}" for one, other in itertools.combinations(plain, 2)]
    pairs = [(spec, family) for spec in specs for family in FAMILIES]
    rows = [attempt(spec, family) for spec, family in track(pairs, "policies on towers")]
    file = HERE / "results" / ("support_long.jsonl" if long else "support.jsonl")
    file.parent.mkdir(exist_ok=True)
    lines = [families_of(spec, rows) for spec in specs] if long else rows
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    verdicts = [row["verdict"] for row in rows]
    print({verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))})
    for row in rows:
        if row["verdict"] == "dead":
            print(f"{row['policy']} on {row['family']}: {row['reason']}")
    print(f"written to {file}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
