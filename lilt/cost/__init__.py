"""Costs: of published systems, of finished runs, and of a planned run before it is paid for."""

from __future__ import annotations

from lilt.cost.entry import Entry
from lilt.cost.estimate import estimate
from lilt.cost.published import PUBLISHED, Published, published
from lilt.cost.runs import read_run
from lilt.cost.show import facts, table

__all__ = ["PUBLISHED", "Entry", "Published", "estimate", "facts", "published", "read_run", "table"]
