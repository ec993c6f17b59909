"""Seconds by part and energy, over all the sittings of a run."""

from __future__ import annotations

import time

import pytest

from lilt.train import meter as module
from lilt.train.bill import Bill
from lilt.train.meter import PARTS, Meter


def test_parts_add_up_even_where_an_error_ends_one() -> None:
    meter = Meter()
    with meter("steps"):
        time.sleep(0.02)
    with pytest.raises(KeyError), meter("data"):
        time.sleep(0.02)
        raise KeyError
    assert list(meter.seconds) == list(PARTS)
    assert meter.seconds["steps"] >= 0.02 and meter.seconds["data"] >= 0.02
    assert meter.total == sum(meter.seconds.values()) == pytest.approx(meter.device_seconds)


def test_sittings_add_up() -> None:
    first, began, second = Meter(), Meter(), Meter()
    first.seconds |= {"steps": 10.0, "starting": 1.0}
    first.device_seconds = 44.0  # of four processes
    began.seconds["starting"], began.device_seconds = 2.0, 2.0
    second.load_state_dict(first.state_dict())
    second.include(began)
    assert second.seconds == {"starting": 3.0, "data": 0.0, "steps": 10.0, "evaluation": 0.0, "saving": 0.0}
    assert (second.total, second.device_seconds) == (13.0, 46.0)
    assert first.total == 11.0  # what was saved is not shared


def test_energy_counts_from_the_first_meter_of_each_sitting(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = 100.0
    monkeypatch.setattr(module, "_joules", lambda: counter)  # the driver's, which runs on between sittings
    first = Meter()
    counter = 130.0
    state = first.state_dict()
    counter = 1000.0
    began = Meter()
    counter = 1005.0
    second = Meter()
    second.load_state_dict(state)
    second.include(began)
    counter = 1020.0
    assert (state["joules"], second.joules) == (30.0, 50.0)


def test_energy_of_which_a_part_is_unknown_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Meter().state_dict() | {"joules": None}
    monkeypatch.setattr(module, "_joules", lambda: 5.0)
    second = Meter()
    second.load_state_dict(state)
    assert second.joules is None


def test_dollars_are_of_all_device_hours() -> None:
    bill = Bill("H100", 4, hours=2.0, device_hours=7.5, price=2.0)
    assert bill.dollars == 15.0
    assert Bill("H100", 4, 2.0, 7.5).dollars is None
    assert bill.record()["dollars"] == 15.0
