"""The study of the second system as tables; `report.py` calls it."""

from __future__ import annotations

from typing import Any

from distillation import STUDIES, options_of

Row = dict[str, Any]
HEAD = """## A teacher, a shared encoder, a policy, the batch

`LILT_KIT=FOLDER python benchmarks/distillation.py`: recipes/rsicd_liteitr.yaml (halves of DeiT-tiny and
all-MiniLM-L6-v2, one shared block, a supervised DeiT-tiny as teacher), {px} px, {pairs:,} pairs each, seeds {seeds};
compared on validation. Seconds on two cores with other work on them.

"""


def distillation(rows: list[Row]) -> str:
    """Return the section: one table a study, its runs found by their settings, since studies share some."""
    if not rows:
        return ""
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    text = HEAD.format(
        px=first["image_px"], pairs=first["steps"] * first["batch_size"], seeds=", ".join(map(str, seeds))
    )
    for study, ways in STUDIES.items():
        found = {
            name: [row for seed in seeds if (row := _find(rows, settings, seed))] for name, settings in ways.items()
        }
        if len([name for name, runs in found.items() if runs]) < 2:
            continue
        text += f"| {study} | trained | val mR | test mR | s | peak MiB | runs |\n|---|--:|--:|--:|--:|--:|--:|\n"
        for name, runs in found.items():
            if not runs:
                continue
            r = runs[0]
            val, test, seconds = (
                sum(values) / len(runs)
                for values in (
                    [run["val_mean_recall"] for run in runs],
                    [run["test"]["mean_recall"] for run in runs],
                    [run["seconds"] for run in runs],
                )
            )
            mib = r["peak_bytes"] / 2**20
            text += (
                f"| {name} | {r['trained']:,} | {val:.2f} | {test:.2f} | {seconds:,.0f} | {mib:,.0f} | {len(runs)} |\n"
            )
        text += "\n"
    return text


def _find(rows: list[Row], settings: dict[str, str], seed: int) -> Row | None:
    wanted = options_of(settings, str(seed))
    return next((row for row in rows if row["key"][: len(wanted)] == wanted), None)
