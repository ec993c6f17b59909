"""What finished runs cost, from their own folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lilt.cli import main
from lilt.train import read_metrics
from tests.cost.conftest import Ask, Options, refused
from tests.cost.slow import REST
from tests.test_distributed import ROOT, torchrun


@pytest.fixture
def run(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", *options(output=tmp_path / "run", price=3)]) == 0
    return tmp_path / "run"


def test_a_run_knows_its_cost(run: Path, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    table = " ".join(capsys.readouterr().out.split())
    (row,) = ask(str(run))
    assert (row["name"], row["device"], row["processes"], row["price"]) == (str(run), "cpu", 1, 3)
    seconds = 3600 * row["hours"]
    assert row["device_hours"] == pytest.approx(row["hours"])
    assert row["dollars"] == pytest.approx(3 * row["hours"])
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert list(row["shares"]) == ["starting", "data", "steps", "evaluation", "saving"]
    # 5 steps of 8; the test split before and after, the validation split once
    assert row["shares"]["steps"] * seconds > 40 * REST
    assert row["shares"]["evaluation"] * seconds > (10 + 20 + 10) * REST
    assert all(share > 0 for share in row["shares"].values())
    assert row["pairs_per_second"] < 1 / REST
    last = read_metrics(run)[-1]
    assert sum(last["seconds_by_part"].values()) == pytest.approx(seconds, abs=0.05)
    assert row["joules"] is None
    for part in ("time in starting", "time in evaluation", "process-hours (1 x cpu)", "dollars (at 3 an hour)"):
        assert part in table
    assert "energy" not in table


def test_another_price_replaces_its_own(run: Path, ask: Ask) -> None:
    own, other = (ask(str(run), *price)[0] for price in ((), ("--price", "0.69")))
    assert other["dollars"] == pytest.approx(0.69 * own["device_hours"])
    assert {key for key in own if own[key] != other[key]} == {"price", "dollars"}


def test_several_runs_are_rows_of_one_table(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", str(80 + len(str(run))))
    assert main(["cost", str(run), str(run)]) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "devices hours process-hours $/h $ pairs/s"
    assert "starting % data % steps % evaluation % saving %" in lines
    assert text.count(str(run)) == 4 and text.count("1 x cpu") == 2
    assert "on cpu the hours are those of processes, not of GPUs" in text


def test_a_run_may_go_on_at_another_price(run: Path, ask: Ask) -> None:
    before = ask(str(run))[0]
    assert main(["train", "--config", str(run / "config.yaml"), "--resume", "--price=5"]) == 0
    after = ask(str(run))[0]
    assert after["price"] == 5
    assert after["hours"] > before["hours"]  # it was built and tested once more


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"holds no metrics.jsonl; expected the folder of a finished `lilt train`; check the path"),
        ([], r"stopped at step 0 and never came to its end; expected a finished run; finish it: lilt train --config "),
        ([{"step": 7, "loss": 1.0}], r"stopped at step 7 .* finish it: lilt train --config .*config.yaml --resume"),
        ([{"step": 7, "seconds_by_part": {"steps": 1.0}}], r"did not note on how many devices; .* train it again"),
    ],
)
def test_what_is_no_finished_run_is_refused(
    lines: list[dict[str, Any]] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = refused(capsys, "cost", str(tmp_path))
    assert re.search(message, said) and str(tmp_path) in said


@pytest.mark.parametrize("argv", [["cost"], ["cost", "RUN"], ["cost", "--data=demo"], ["train"]])
@pytest.mark.parametrize("price", ["-0.5", ".nan", ".inf"])
def test_a_price_is_no_less_than_nothing(
    argv: list[str], price: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *argv, f"--price={price}")
    assert f"price={price.lstrip('.')}; expected dollars per accelerator-hour, 0 or more; give what an hour" in said
    assert not list(tmp_path.iterdir())


def test_two_processes_are_paid_twice(options: Options, tmp_path: Path, ask: Ask) -> None:
    torchrun(2, ROOT / "recipes" / "train.py", *options(output=tmp_path / "run", price=0.5))
    (row,) = ask(str(tmp_path / "run"))
    assert row["processes"] == 2
    assert row["device_hours"] == pytest.approx(2 * row["hours"])
    assert row["dollars"] == pytest.approx(row["hours"])
