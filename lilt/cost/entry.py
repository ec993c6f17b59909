"""One line of an answer about costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lilt.train.bill import Bill


@dataclass(frozen=True)
class Entry:
    """A system or run, its bill (None: nobody has published it), its speed in steps, and where the numbers are from."""

    name: str
    bill: Bill | None
    pairs_per_second: float | None = None
    about: str = ""

    def record(self) -> dict[str, Any]:
        """Return it for JSON: the same keys for every entry."""
        unknown = dict.fromkeys([*(field.name for field in fields(Bill)), "dollars"])
        bill = unknown if self.bill is None else self.bill.record()
        return {"name": self.name, **bill, "pairs_per_second": self.pairs_per_second, "about": self.about}
