"""What came out: the table at the end of a run, the page of a run, and several runs side by side."""

from __future__ import annotations

from lilt.report.compare import Row, compare_runs
from lilt.report.compare_show import check_drawable, check_page, compare_page, compare_plot, compare_table
from lilt.report.page import Written, write_report
from lilt.report.table import report_table

__all__ = [
    "Row", "Written", "check_drawable", "check_page", "compare_page", "compare_plot", "compare_runs", "compare_table",
    "report_table", "write_report",
]  # fmt: skip
