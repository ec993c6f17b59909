"""The comparison as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilt.budgets.row import Budget
from lilt.budgets.show import in_bytes

PICTURES = (".png", ".pdf", ".svg")


def check_plot(file: str, overwrite: bool = False) -> Path:
    """Return where a plot can be written. Raises ValueError when it cannot, before anything is computed."""
    path = Path(file)
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"plot={file}: unknown ending; expected one of {', '.join(PICTURES)}; rename it")
    if not path.parent.is_dir():
        raise ValueError(f"plot={file}: there is no folder {path.parent}; expected one that exists; make it first")
    if path.exists() and not overwrite:
        raise ValueError(
            f"plot={file} is already there; nothing was changed: replace it with --overwrite, or rename it"
        )
    check_matplotlib("plot")
    return path


def check_matplotlib(what: str) -> None:
    """Raise ValueError where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(f"{what} needs matplotlib, which is not installed; pip install 'lilt[plot]'") from None


def plot(rows: Sequence[Budget], about: str, path: Path) -> None:
    """Draw trained share against step cost, each policy a bubble as large as its saved activations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    largest = max(row.saved_bytes for row in rows)
    axes.scatter(
        [row.percent for row in rows],
        [row.step_flops_ratio for row in rows],
        s=[20 + 600 * row.saved_bytes / largest for row in rows],
        alpha=0.5,
    )
    for i, row in enumerate(sorted(rows, key=lambda row: row.percent)):
        where = {
            "xytext": (0, 8 if i % 2 else -8),
            "textcoords": "offset points",
        }  # neighbours do not write on each other
        axes.annotate(row.policy, (row.percent, row.step_flops_ratio), fontsize=8, ha="center", va="center", **where)
    axes.set(xscale="log", xlabel="trained values, % of the model", ylabel="step FLOPs relative to full")
    axes.set_title(f"bubble: activations saved, largest {in_bytes(largest)}\n{about}", fontsize=8, wrap=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
