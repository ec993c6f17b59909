"""The published cost table comes out of hardware x hours x price."""

from __future__ import annotations

import pytest

from lilt.cli import main
from lilt.cost import PUBLISHED
from tests.cost.conftest import Ask

# as published, which cuts VLMo's cents off
DOLLARS = {"CLIP": 77_414, "VLMo": 9_676, "CoCa": 356_106, "LiteITR": 15.5}


def test_the_published_dollars(ask: Ask) -> None:
    found = {row["name"]: row for row in ask()}
    assert list(found) == [*DOLLARS, "FLAVA", "BEiT-3"]
    for name, dollars in DOLLARS.items():
        assert found[name]["dollars"] == pytest.approx(dollars, abs=0.05 if dollars < 100 else 1), name
    hours = {name: round(found[name]["device_hours"], 1) for name in DOLLARS}
    assert hours == {"CLIP": 73_728, "VLMo": 9_216, "CoCa": 245_760, "LiteITR": 22.4}
    assert all("arXiv" in row["about"] or "doi" in row["about"] for row in found.values())


def test_who_publishes_no_compute_has_no_cost(ask: Ask) -> None:
    rows = ask()
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    for row in rows[-2:]:
        assert "publishes no compute" in row["about"]
        assert not any(value is not None for key, value in row.items() if key not in ("name", "about"))


def test_another_price_is_one_for_all(ask: Ask) -> None:
    doubled = {row["name"]: row["dollars"] for row in ask("--price=2")}
    for row in PUBLISHED:
        assert doubled[row.system] == pytest.approx(2 * row.count * row.hours)
    assert doubled["FLAVA"] is None


def test_the_table_shows_the_three_factors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["cost"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "devices hours GPU-hours $/h $"
    assert "CLIP 256 x V100 288 73,728 1.05 77,414" in lines
    assert "CoCa 2,048 x TPUv4 120 245,760 1.449 356,106" in lines
    assert "LiteITR 2 x RTX 4090 11.20 22.40 0.69 15.46" in lines
    assert "BEiT-3" in lines
