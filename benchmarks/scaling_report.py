"""The section of RESULTS.md on how a step grows, and its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Row = dict[str, Any]
PLOT = Path(__file__).parent / "results" / "scaling.svg"
AXES = {"batch": "batch_size", "pairs": "pairs", "processes": "processes"}
SECTION = """## Scaling

`python benchmarks/scaling.py`: tiny towers at 32 px, all weights trained, micro-batches of 64, the loss in tiles of
2,048, on {machine}.
Starting: reading the manifest and encoding the captions. Memory is the peak of the whole process; scaling.svg.

| with | pairs | batch | processes | starting s | s a step | pairs/s | MiB |
|---|--:|--:|--:|--:|--:|--:|--:|
"""


def scaling(rows: list[Row]) -> str:
    """Return the section on scaling, of the newest row of each point; draw the curves."""
    points = {tuple(r[key] for key in ("what", *AXES.values())): r for r in rows}
    found = list(points.values())
    if not found:
        return ""
    text = SECTION.format(**found[-1])
    for r in found:
        text += (
            f"| {r['what']} | {r['pairs']:,} | {r['batch_size']:,} | {r['processes']} | {r['starting_s']:.1f} "
            f"| {r['step_s']:.2f} | {r['pairs_per_second']:,.0f} | {r['peak_bytes'] / 2**20:,.0f} |\n"
        )
    draw(found)
    return text + "\n"


def draw(rows: list[Row]) -> None:
    """Write step time and memory against batch, pairs and processes as a picture."""
    with plt.rc_context({"svg.hashsalt": "lilt", "font.size": 8}):
        figure, grid = plt.subplots(2, len(AXES), figsize=(7, 3.6), sharex="col", layout="constrained")
        for column, (what, key) in enumerate(AXES.items()):
            chosen = sorted((r for r in rows if r["what"] == what), key=lambda r: r[key])
            along = [r[key] for r in chosen]
            grid[0, column].plot(along, [r["step_s"] for r in chosen], marker="o", color="#0072b2")
            grid[1, column].plot(along, [r["peak_bytes"] / 2**30 for r in chosen], marker="o", color="#d55e00")
            grid[1, column].set_xlabel(what)
            for axes in grid[:, column]:
                axes.set_xscale("log")
                axes.spines[["top", "right"]].set_visible(False)
                axes.set_ylim(bottom=0)
            if what == "batch":
                grid[0, column].set_yscale("log")
                grid[0, column].set_ylim(chosen[0]["step_s"] / 2, chosen[-1]["step_s"] * 2)
            if what == "processes":
                grid[1, column].set_xticks(along, [f"{count}" for count in along])
                grid[1, column].minorticks_off()
        grid[0, 0].set_ylabel("seconds a step")
        grid[1, 0].set_ylabel("GiB, whole process")
        figure.savefig(PLOT, metadata={"Date": None})
        plt.close(figure)
