"""The table at the end of a run."""

from __future__ import annotations

from rich.table import Table

from lilt.cost import facts
from lilt.run import Report


def report_table(report: Report) -> Table:
    """Return recalls before and after, what was trained, and what it cost."""
    place = report.outcome.place
    table = Table("", "before", "after", title="test split" if report.after else "no test split")
    for side, title in (("text_to_image", "text→image"), ("image_to_text", "image→text")):
        for metric in ("R@1", "R@5", "R@10", "median_rank") if report.after else ():
            cells = [f"{result[side][metric]:.2f}" if result else "-" for result in (report.before, report.after)]
            table.add_row(f"{title} {metric}", *cells)
    if report.after:
        before = f"{report.before['mean_recall']:.2f}" if report.before else "-"
        table.add_row("mean recall", before, f"{report.after['mean_recall']:.2f}")
        for name, recall in report.references.items():
            table.add_row(name, "", f"{recall:.2f}")
        chance = 100 / report.after["num_images"]
        table.add_row("text→image R@1 of chance", "", f"{chance:.2f}", end_section=True)
    table.add_row("trained values", "", f"{report.trained:,} ({100 * report.trained / report.total:.2f} %)")
    table.add_row("best step (by validation)", "", f"{place.best_step} of {report.outcome.steps}")
    table.add_row("seconds", "", f"{report.outcome.meter.total:.1f}")
    for name, value in facts(report.bill) if report.bill else ():
        table.add_row(name, "", value)
    table.add_row("pairs per second", "", f"{report.outcome.pairs_per_second:.1f}")
    table.add_row("peak memory", "", f"{report.outcome.peak_bytes / 2**20:,.0f} MiB")
    table.add_row("adapter file", "", f"{report.adapter_bytes / 2**20:.2f} MiB")
    table.add_row("written to", "", str(report.folder))
    return table
