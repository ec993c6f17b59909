"""Budgets: what each tuning policy would train and cost on a pair of towers, known before any weight is read."""

from __future__ import annotations

from lilt.budgets.compare import Comparison, compare
from lilt.budgets.cost import Cost, meta_batch, step_cost
from lilt.budgets.request import Request, answer
from lilt.budgets.row import Budget
from lilt.budgets.show import table

__all__ = ["Budget", "Comparison", "Cost", "Request", "answer", "compare", "meta_batch", "step_cost", "table"]
