"""What the compared systems cost: hardware, hours and prices as published; everything else is computed from them."""

from __future__ import annotations

from dataclasses import dataclass

from lilt.cost.entry import Entry
from lilt.train.bill import Bill, check_price


@dataclass(frozen=True)
class Published:
    """A system's training: count devices for hours of the wall clock, at dollars per device-hour."""

    system: str
    device: str
    count: int
    hours: float
    price: float
    source: str

    def entry(self, price: float | None = None) -> Entry:
        """Return what it cost, or what it would at another price."""
        asked = self.price if price is None else price
        bill = Bill(self.device, self.count, self.hours, self.count * self.hours, price=asked)
        return Entry(self.system, bill, about=self.source)


# the prices are those that Cares et al. 2025 compare all systems by
PUBLISHED = (
    Published("CLIP", "V100", 256, 12 * 24, 1.05, "ViT-L/14; Radford et al. 2021, arXiv 2103.00020, sec. 2.5"),
    Published("VLMo", "V100", 128, 3 * 24, 1.05, "Bao et al. 2022, arXiv 2111.02358"),
    Published("CoCa", "TPUv4", 2048, 5 * 24, 1.449, "Yu et al. 2022, arXiv 2205.01917"),
    Published("LiteITR", "RTX 4090", 2, 11.2, 0.69, "Cares et al. 2025, doi 10.1109/IDAACS68557.2025.11322222"),
)
SILENT = {"FLAVA": "Singh et al. 2022, arXiv 2112.04482", "BEiT-3": "Wang et al. 2022, arXiv 2208.10442"}


def published(price: float | None = None) -> list[Entry]:
    """Return the compared systems, all at another price per device-hour if one is given."""
    check_price(price)
    silent = [Entry(name, None, about=f"publishes no compute; {source}") for name, source in SILENT.items()]
    return [*(row.entry(price) for row in PUBLISHED), *silent]
