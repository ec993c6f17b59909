"""An estimate from a few steps agrees with the run that it is about, and leaves nothing behind."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import pytest

from lilt.cli import main
from lilt.cost.estimate import Pace, one_pass, project
from lilt.cost.plan import Plan
from lilt.data import Sample
from lilt.train import read_metrics
from tests.cost.conftest import Ask, Options, refused
from tests.cost.slow import REST


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary folders, to see what stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_it_agrees_with_the_run(options: Options, ask: Ask, tmp_path: Path, temporary: Path) -> None:
    words = options(epochs=6, eval_every=1.2, price=0.69)
    (told,) = ask(*words, "--steps=6")
    assert not list(temporary.iterdir())
    assert main(["train", *words, f"--output={tmp_path / 'run'}"]) == 0
    (found,) = ask(str(tmp_path / "run"))
    validations = [r for r in read_metrics(tmp_path / "run") if r.get("split") == "val"]
    plan = f"the run has {read_metrics(tmp_path / 'run')[-1]['step']} steps and looks at the validation split "
    assert f"from 6 measured steps of 8 pairs; {plan}{len(validations)} x, at the test split 2 x" in told["about"]
    assert (told["name"], told["device"], told["processes"], told["price"]) == ("planned run", "cpu", 1, 0.69)
    assert told["dollars"] == pytest.approx(0.69 * told["hours"])
    assert sum(told["shares"].values()) == pytest.approx(1)
    # the tower rests a known time for each image, in both; beyond that a machine with other work takes what it takes,
    # so the estimate is held between that and four times as much: a batch of 8 counted wrongly is further off
    steps = read_metrics(tmp_path / "run")[-1]["step"]
    rests = {"steps": steps * 8 * REST, "evaluation": (len(validations) * 20 + 2 * 10) * REST}
    for part, rest in rests.items():
        estimated, took = (3600 * row["shares"][part] * row["hours"] for row in (told, found))
        assert rest < took, part
        assert rest < estimated < 4 * rest, part
    assert told["pairs_per_second"] < 1 / REST


def test_several_processes_are_assumed_to_be_as_fast_as_one(options: Options, ask: Ask) -> None:
    (row,) = ask(*options(batch_size=16, epochs=8), "--gpus=4", "--steps=3")
    assert "from 3 measured steps of 4 pairs; the run has 16 steps" in row["about"]
    assert "linear scaling assumed: 4 processes take 16 pairs as fast as one takes 4" in row["about"]
    assert row["processes"] == 4 and row["dollars"] is None
    assert row["device_hours"] == pytest.approx(4 * row["hours"])
    assert row["pairs_per_second"] < 4 / REST
    seconds = {part: 3600 * row["hours"] * share for part, share in row["shares"].items()}
    # 16 steps of 4 pairs each; 8 passes over 20 pictures and 2 over 10, each shared by four
    assert seconds["steps"] > 16 * 4 * REST
    assert seconds["evaluation"] > (8 * 20 + 2 * 10) * REST / 4
    assert row["pairs_per_second"] >= 0.999 * 16 * 16 / (seconds["steps"] + seconds["data"])


def test_the_sum_over_all_that_a_run_does() -> None:
    pace = Pace("H100", 32, 7.0, {"data": 0.5, "steps": 2.0}, {"data": 3.0, "steps": 1.0}, 0.25, 40.0, 10.0)
    plan = Plan(steps=100, batch=64, states=5, validations=4, tests=2)
    for gpus, looks in ((1, 180.0), (2, 90.0)):
        bill = project(pace, plan, gpus, price=3.6)
        seconds = {"starting": 7.0, "data": 53.0, "steps": 201.0, "evaluation": looks, "saving": 1.25}
        total = sum(seconds.values())
        assert bill.hours == pytest.approx(total / 3600)
        assert bill.device_hours == pytest.approx(gpus * total / 3600)
        assert bill.dollars == pytest.approx(gpus * total / 1000)
        assert bill.shares == pytest.approx({part: spent / total for part, spent in seconds.items()})


def test_a_recipe_is_planned_and_its_own_folder_left_alone(
    options: Options, tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: bitfit\nmax_steps: 1000000\nval_split: none\nbatch_size: 2\nprice: 2\n")
    words = [word for word in options() if not word.startswith("--batch_size")]
    run = tmp_path / "run"
    assert main(["cost", "--config", str(recipe), *words, "--test_split=none", "--steps=2", f"--output={run}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the run has 1,000,000 steps and looks at the validation split 0 x, at the test split 0 x" in text
    assert "planned run 1 x cpu" in text and "process-hours $/h $" in text
    assert not run.exists() and not list(temporary.iterdir())


def test_a_long_pass_is_measured_on_a_few() -> None:
    sample = Sample(Path("red.png"), ("red",), "val")
    seen: list[int] = []

    def look(samples: list[Sample]) -> None:
        seen.append(len(samples))
        time.sleep(0.1 + 0.002 * len(samples))

    assert one_pass(look, [], 100) == 0
    assert one_pass(look, [sample] * 100, 100) == pytest.approx(0.3, rel=0.2)
    assert seen == [8, 100]
    # what a pass takes once is not multiplied
    assert one_pass(look, [sample] * 1000, 200) == pytest.approx(0.1 + 2.0, rel=0.2)
    assert seen[2:] == [8, 200, 100]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps=0", "--data=demo"], "steps=0; expected 1 or more; give a positive whole number"),
        (["--gpus=0"], "gpus=0; expected 1 or more"),
        (["--gpus=4", "--batch_size=3"], "batch_size=3 leaves no pair for each of 4 processes; use fewer"),
        (["some/run", "--gpus=2"], "--gpus=2 is about a planned run, some/run is a finished one; ask for one of them"),
        (["--policy=layernrom"], "unknown policy 'layernrom'; known: .* Did you mean 'layernorm'"),
        (["--epochs=0"], "epochs=0.0; expected more than 0"),
        (["--max_steps=0"], "max_steps=0; expected more than 0"),
        (["--eval_every=-1"], "eval_every=-1.0; expected more than 0"),
        (["--test_split=tst"], "has no split 'tst'; .* Did you mean 'test'"),
        (["--stps=3"], "unknown option 'stps'; lilt cost --help lists all. Did you mean 'steps'"),
    ],
)
def test_errors_say_what_to_do(
    argv: list[str], message: str, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, "cost", *argv))
    assert not list(temporary.iterdir())


def test_an_estimate_is_of_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # what every launcher of several processes sets
    said = refused(capsys, "cost", "--data=demo")
    assert "several processes were started, and an estimate measures one; start it alone, with --gpus N" in said
