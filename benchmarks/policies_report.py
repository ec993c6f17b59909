"""The policy study as tables and a plot; `report.py` calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
PLOT = Path(__file__).parent / "results" / "policies-gained-and-kept.svg"
ALL = 8734
STUDY = """## The policy study

`LILT_KIT=FOLDER python benchmarks/policies.py`: RSICD at {px} px, {steps} steps of {batch_size} pairs ({passes:.1f}
passes over {images:,} images), measured at the end; seeds {seeds}. Rates compared on validation, the best one
shown; `own`: each part of the policy at its own. kept: top-1 of DeiT-tiny's own classifier on the tuned features over
that on the original ones ({before:.1f} %), 1,000 ImageNet photographs (training images: a comparison, no accuracy), at
the resolution of training: above 100 is a tower that has learnt to see at {px} px, for it was pretrained at 224; the
next section has both. step: FLOPs of a step over those of full training. Seconds on two cores with other work on
them. {plot} shows it.

"""
RATES = """### Learning rates

Validation mR after the same steps, seed {seed}.

"""
SIZES = """### Fewer pairs

The same number of steps on fewer images; test mR.

"""
COMPUTE = """### The same compute

As many steps as cost the FLOPs of {steps} of full training; test mR.

"""


def policies(rows: list[Row]) -> str:
    """Return the sections of the policy study: gained and kept, rates, fewer pairs, the same compute."""
    equal = [r for r in rows if r["study"] == "steps"]
    whole = [r for r in equal if r["images"] == ALL]
    if not whole:
        return ""
    best = {name: best_rate([r for r in whole if r["policy"] == name]) for name in names(whole)}
    first = whole[0]
    text = STUDY.format(
        px=first["image_px"],
        steps=first["steps"],
        batch_size=first["batch_size"],
        passes=first["steps"] * first["batch_size"] / ALL,
        images=ALL,
        seeds=", ".join(map(str, sorted({r["seed"] for r in whole}))),
        before=first["before"],
        plot=PLOT.name,
    )
    text += _gained(best) + _claims(best) + _rates(whole) + _fewer(equal, best)
    text += _same_compute([r for r in rows if r["study"] == "compute"])
    study_plot(best)
    return text


def names(rows: list[Row]) -> list[str]:
    """Return the policies in their order."""
    return list(dict.fromkeys(r["policy"] for r in rows))


def rate(row: Row) -> str:
    """Return the learning rate as it is shown."""
    return "own" if row["lr"] is None else f"{row['lr']:g}"


def best_rate(rows: list[Row]) -> list[Row]:
    """Return the runs, one a seed, with the rate that is best on validation."""
    by_rate = [[r for r in rows if rate(r) == one] for one in dict.fromkeys(map(rate, rows))]
    return max(by_rate, key=lambda runs: mean(runs, lambda r: r["val_mean_recall"]))


def recall(row: Row) -> float:
    """Return the mean recall on the test split."""
    return float(row["test"]["mean_recall"])


def percent(row: Row) -> float:
    """Return the share of the values that is trained."""
    return 100 * float(row["trained"]) / float(row["total"])


def mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    """Return the mean of a value over rows."""
    return sum(map(value, rows)) / len(rows)


def _gained(best: dict[str, list[Row]]) -> str:
    columns = "lr|trained|%|step|val mR|test mR|of full|kept %|s|peak MiB|adapter MiB|runs"
    text = "| policy | " + columns.replace("|", " | ") + " |\n|---|" + "--:|" * len(columns.split("|")) + "\n"
    full = mean(best["full"], recall) if "full" in best else math.nan
    for name, runs in sorted(best.items(), key=lambda item: mean(item[1], recall)):
        r = runs[0]
        text += (
            f"| `{name}` | {rate(r)} | {r['trained']:,} | {percent(r):.2f} | {r['step_ratio']:.2f} | "
            f"{mean(runs, lambda r: r['val_mean_recall']):.2f} | {mean(runs, recall):.2f} | "
            f"{mean(runs, recall) / full:.2f} | {mean(runs, lambda r: r['kept']):.0f} | "
            f"{mean(runs, lambda r: r['seconds']):,.0f} | {r['peak_bytes'] / 2**20:,.0f} | "
            f"{r['adapter_bytes'] / 2**20:.2f} | {len(runs)} |\n"
        )
    return text + "\n"


def _claims(best: dict[str, list[Row]]) -> str:
    """State the paper's two claims as they are measured here."""
    if "full" not in best:
        return ""
    full, text = mean(best["full"], recall), ""
    for share, claim in ((7, "under 7 % of the values equals full training"), (1, "under 1 % reaches 75 % of it")):
        under = {name: runs for name, runs in best.items() if percent(runs[0]) < share}
        if under:
            name = max(under, key=lambda name: mean(under[name], lambda r: r["val_mean_recall"]))
            reached = mean(under[name], recall)
            text += (
                f'- Khan & Fu: "{claim}". Here, by validation, `{name}` with {percent(under[name][0]):.2f} % reaches '
                f"{100 * reached / full:.0f} % ({reached:.2f} of {full:.2f}).\n"
            )
    return text + "\n" if text else ""


def _rates(whole: list[Row]) -> str:
    """Return the table of validation recall against the learning rate."""
    seed = min(r["seed"] for r in whole)
    tried = [r for r in whole if r["seed"] == seed]
    several = [name for name in names(tried) if len({rate(r) for r in tried if r["policy"] == name}) > 1]
    if not several:
        return ""
    text = RATES.format(seed=seed) + "| policy | rates |\n|---|---|\n"
    for name in several:
        runs = sorted((r for r in tried if r["policy"] == name), key=lambda r: r["lr"] or 0)
        text += f"| `{name}` | " + ", ".join(f"{rate(r)}: {r['val_mean_recall']:.2f}" for r in runs) + " |\n"
    return text + "\n"


def _fewer(rows: list[Row], best: dict[str, list[Row]]) -> str:
    """Return the table of policies against the number of training images, each at its best rate."""
    chosen = [r for r in rows if rate(r) == rate(best[r["policy"]][0])]
    sizes = sorted({r["images"] for r in chosen})
    several = names([r for r in chosen if r["images"] != ALL])
    if not several:
        return ""
    text = SIZES + "| policy | " + " | ".join(f"{size:,} images" for size in sizes) + " |\n"
    text += "|---|" + "--:|" * len(sizes) + "\n"
    for name in several:
        cells = [[r for r in chosen if r["policy"] == name and r["images"] == size] for size in sizes]
        text += f"| `{name}` | " + " | ".join(f"{mean(c, recall):.2f}" if c else "" for c in cells) + " |\n"
    return text + "\n"


def _same_compute(rows: list[Row]) -> str:
    if not rows:
        return ""
    steps = next((r["steps"] for r in rows if r["policy"] == "full"), 136)
    text = COMPUTE.format(steps=steps) + "| policy | lr | steps | test mR | runs |\n|---|--:|--:|--:|--:|\n"
    for name in names(rows):
        runs = best_rate([r for r in rows if r["policy"] == name])
        text += f"| `{name}` | {rate(runs[0])} | {runs[0]['steps']} | {mean(runs, recall):.2f} | {len(runs)} |\n"
    return text + "\n"


def study_plot(best: dict[str, list[Row]]) -> None:
    """Draw test recall and knowledge kept against trained parameters."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    values: dict[str, Callable[[Row], float]] = {
        "test mean recall": recall,
        "ImageNet top-1 kept (%)": lambda r: float(r["kept"]),
    }
    for axis, (name, value) in zip(axes, values.items(), strict=True):
        for policy, runs in best.items():
            x, y = runs[0]["trained"], mean(runs, value)
            axis.plot(x, y, "o", color="tab:blue", markersize=4)
            axis.annotate(policy, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="trained parameters", ylabel=name)
        axis.grid(alpha=0.3)
    plt.rcParams["svg.hashsalt"] = "lilt"  # the same figure is the same file
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)
