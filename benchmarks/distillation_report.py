"""The study of the second system as tables; `report.py` calls it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from distillation import STUDIES, options_of

Row = dict[str, Any]
HEAD = """## A teacher, a shared encoder, a policy, the batch

`LILT_KIT=FOLDER python benchmarks/distillation.py`: recipes/rsicd_liteitr.yaml (halves of DeiT-tiny and
all-MiniLM-L6-v2, one shared block, a supervised DeiT-tiny as teacher), {px} px, {pairs:,} pairs each, seeds {seeds};
compared on validation. Seconds on two cores with other work on them. {plot} shows it.

"""
PLOT = Path(__file__).parent / "results" / "distillation.svg"


TEACHERS = """## A self-supervised or a supervised teacher

`python benchmarks/teachers.py`: both pretrained by one script on the same scenes for {steps} steps, then teachers of
an untrained ViT of half the depth beside half of the demo's text tower, by contrastive distillation with a bank; the
demo's split. Mean over seeds ({seeds}), with the least and the most where there are several.

"""


def distillation(rows: list[Row]) -> str:
    """Return the section: one table a study, its runs found by their settings, since studies share some."""
    if not rows:
        return ""
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    text = HEAD.format(
        px=first["image_px"],
        pairs=first["steps"] * first["batch_size"],
        seeds=", ".join(map(str, seeds)),
        plot=PLOT.name,
    )
    shown: dict[str, dict[str, float]] = {}
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
            r, mib = runs[0], runs[0]["peak_bytes"] / 2**20
            val = fmean(run["val_mean_recall"] for run in runs)
            test = fmean(run["test"]["mean_recall"] for run in runs)
            seconds = fmean(run["seconds"] for run in runs)
            shown.setdefault(study, {})[name] = val
            text += (
                f"| {name} | {r['trained']:,} | {val:.2f} | {test:.2f} | {seconds:,.0f} | {mib:,.0f} | {len(runs)} |\n"
            )
        text += "\n"
    if shown:
        draw(shown)
    return text


def draw(studies: dict[str, dict[str, float]]) -> None:
    """Write the recalls on validation as a picture, one row of bars a study."""
    with plt.rc_context({"svg.hashsalt": "lilt", "font.size": 8}):
        figure, rows = plt.subplots(
            len(studies), figsize=(7, 0.6 + 0.28 * sum(len(ways) + 2 for ways in studies.values())), squeeze=False,
            sharex=True, layout="constrained", height_ratios=[len(ways) for ways in studies.values()],
        )  # fmt: skip
        for axes, (study, ways) in zip(rows[:, 0], studies.items(), strict=True):
            axes.barh(list(ways), list(ways.values()), color="#0072b2", height=0.6)
            axes.bar_label(axes.containers[0], fmt="%.2f", padding=3)
            axes.invert_yaxis()
            axes.set_title(study, loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        rows[-1, 0].set_xlabel("mean recall on validation, %")
        figure.savefig(PLOT, metadata={"Date": None})
        plt.close(figure)


def _find(rows: list[Row], settings: dict[str, str], seed: int) -> Row | None:
    wanted = options_of(settings, str(seed))
    return next((row for row in rows if row["options"] == wanted), None)


def teachers(rows: list[Row]) -> str:
    """Return the section on what kind of teacher helps: one table for each length of pretraining."""
    text = ""
    for steps in dict.fromkeys(row["pretraining_steps"] for row in rows):
        chosen = [row for row in rows if row["pretraining_steps"] == steps]
        kinds = dict.fromkeys(row["teacher"] for row in chosen)
        text += TEACHERS.format(steps=steps, seeds=len({row["seed"] for row in chosen}))
        text += "| teacher | val mR | test mR |\n|---|--:|--:|\n"
        for kind in kinds:
            runs = [row for row in chosen if row["teacher"] == kind]
            cells = (_spread([r["val_mean_recall"] for r in runs]), _spread([r["test"]["mean_recall"] for r in runs]))
            text += f"| {kind} | {cells[0]} | {cells[1]} |\n"
        text += "\n"
    return text


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"
