"""Reports of runs that are not whole, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lilt.cli import main
from lilt.report.page import PARTS
from lilt.train import read_metrics
from tests.report.conftest import Train
from tests.report.dom import Node, read
from tests.report.test_page import check_closed
from tests.test_distributed import torchrun


def report(run: Path, *words: str) -> Node:
    assert main(["report", str(run), "--workers=0", "--overwrite", *words]) == 0
    return check_closed((run / "report.html").read_text(encoding="utf-8"))


def edited(run: Path, **changes: Any) -> None:
    """Change fields of lilt.json."""
    file = run / "lilt.json"
    contract = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(contract | changes), encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())


def test_without_validation_and_test(train: Train) -> None:
    run = train("bare", val_split="none", test_split="none", max_steps=1)
    root = report(run)
    assert [section.attributes["id"] for section in root.all("section")] == list(PARTS)
    assert "No test split was looked at." in root.one(id="recalls").text
    assert not root.one(id="recalls").all("table")
    assert "No validation split was looked at" in root.one(id="curves").text
    assert len(root.one(id="curves").all("svg")) == 3
    assert "name one with --split" in root.one(id="gallery").text
    named = report(run, "--split=val", "--gallery=4")
    assert "6 images and 24 captions of the split 'val'" in named.one(id="gallery").text
    assert len(named.one(id="gallery").all("article")) == 8


def test_other_data_can_be_searched(copied: Path, pictures: Path) -> None:
    root = report(copied, f"--data={pictures / 'manifest.jsonl'}", f"--image_root={pictures}", "--split=train")
    assert "12 images and 36 captions of the split 'train'" in root.one(id="gallery").text


def test_a_run_that_was_stopped(copied: Path) -> None:
    lines = (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (copied / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"step": 5, "lo', encoding="utf-8")
    metrics = json.loads((copied / "lilt.json").read_text(encoding="utf-8"))["metrics"]
    edited(copied, metrics={key: value for key, value in metrics.items() if not key.startswith("test/")})
    root = report(copied, "--gallery=0")
    assert "4 steps, 2 passes over the training pairs so far" in root.one(id="curves").text
    assert "nothing is known of the test split after it" in root.one(id="recalls").text
    assert [t.one("caption").text for t in root.one(id="recalls").all("table")] == [
        "test split, %",
        "validation split, %",
    ]
    assert "The run has not come to its end" in root.one(id="cost").text
    assert "No gallery was asked for" in root.one(id="gallery").text


def test_a_run_of_an_older_version(copied: Path) -> None:
    """As runs were written before they noted their time by part and their bill."""
    *lines, end = read_metrics(copied)
    kept = ("step", "split", "result", "best_step", "seconds", "pairs_per_second", "peak_bytes")
    records = [*lines, {key: end[key] for key in kept}]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    part = report(copied, "--gallery=0").one(id="cost")
    assert "did not note its time by part" in part.text and f"{end['seconds']:.1f} s" in part.text


def test_a_merged_run(run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "half"
    assert main(["merge", str(run), "--scale=0.5", f"--output={merged}"]) == 0
    root = report(merged, "--gallery=4")
    assert "holds no record of a training" in root.one(id="curves").text
    assert "holds no record of a training" in root.one(id="cost").text
    assert "has not come to its end" not in root.text
    assert len(root.one(id="gallery").all("article")) == 8
    assert root.one(id="recipe").all("pre")[0].text == f"lilt merge {run} --scale 0.5 --output {merged}-again"


def test_a_loss_that_was_no_number_is_a_gap(copied: Path) -> None:
    records = read_metrics(copied)
    losses = [record for record in records if "loss" in record]
    losses[1]["loss"], losses[1]["skipped_steps"], losses[3]["skipped_steps"] = None, 1, 1
    (copied / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    root = report(copied, "--gallery=0")
    assert "nan" not in root.one(id="curves").all("svg")[0].attributes["aria-label"]
    facts = {
        node.children[0].text: node.children[1].text
        for node in root.one(id="cost").all("div")
        if len(node.children) == 2
    }
    assert facts["steps left out, their gradient not finite"] == "1"


def test_towers_that_are_not_here_leave_the_rest(copied: Path, tmp_path: Path, capsys: Any) -> None:
    contract = json.loads((copied / "lilt.json").read_text(encoding="utf-8"))
    edited(copied, model=contract["model"] | {"vision": f"timm:{tmp_path / 'gone'}"})
    capsys.readouterr()
    root = report(copied)
    assert "not shown: model: The model cannot be built here" in " ".join(capsys.readouterr().err.split())
    assert "The model cannot be built here" in root.one(id="gallery").text
    part = root.one(id="parameters").text
    counts = {"projection": 1056, "scale": 1}
    for side in ("vision", "text"):
        shapes = [shape for name, shape in contract["tensors"].items() if name.startswith(f"{side}.")]
        counts[side] = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert all(f"{name} {count:,}" in part for name, count in counts.items())
    assert root.one(id="recalls").all("table") and root.one(id="curves").all("svg")
    # what was asked for by name and did not come is an error
    assert main(["report", str(copied), "--task=moved", "--overwrite"]) == 2
    assert "moved failed: there is no model" in (copied / "report.html").read_text(encoding="utf-8")


def test_images_that_cannot_be_read_are_counted(copied: Path, manifest: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(manifest.parent, tmp_path / "pictures"))
    (folder / "red3.jpg").unlink()
    (folder / "blue3.jpg").write_bytes(b"no picture")
    part = report(copied, f"--data={folder / 'manifest.jsonl'}", "--gallery=40").one(id="gallery")
    assert "4 images and 16 captions of the split 'test'" in part.text
    assert "2 images could not be read and were left out (first: " in part.text
    assert len(part.all("article")) == 4 + 16
    for name in ("green3.jpg", "yellow3.jpg", "white3.jpg", "black3.jpg"):
        (folder / name).unlink()
    assert (
        "none of 6 images could be read" in report(copied, f"--data={folder / 'manifest.jsonl'}").one(id="gallery").text
    )


def test_a_task_that_fails_keeps_the_others(copied: Path, capsys: Any) -> None:
    capsys.readouterr()
    words = ["--task=winoground", "--task=moved", "--gallery=0"]
    assert main(["report", str(copied), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "lilt: winoground failed: manifest.jsonl line 1: expected texts under image_0" in said
    part = check_closed((copied / "report.html").read_text(encoding="utf-8")).one(id="conservation")
    assert "winoground failed: manifest.jsonl line 1" in part.one(class_="failed").text
    assert "moved: vision" in [table.one("caption").text for table in part.all("table")]


def test_nothing_is_replaced_unasked(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "report.html").write_text("mine", encoding="utf-8")
    said = refused(capsys, "report", str(copied))
    assert re.search("report.html is already there; nothing was changed: replace it with --overwrite, or", said)
    assert (copied / "report.html").read_text(encoding="utf-8") == "mine"
    before = {file.name: file.read_bytes() for file in copied.iterdir() if file.is_file()}
    report(copied, "--gallery=0")
    after = {file.name: file.read_bytes() for file in copied.iterdir() if file.is_file()}
    assert {name for name in before if before[name] != after[name]} == {"report.html"} and before.keys() == after.keys()


def test_the_same_run_has_the_same_page(copied: Path) -> None:
    report(copied)
    first = (copied / "report.html").read_bytes()
    report(copied)
    assert (copied / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "/nowhere holds no lilt checkpoint; expected lilt.json and adapter.safetensors; check the path"),
        (["RUN", "--gallery=-1"], "gallery=-1; expected how many captions and images to show; give 0 for none"),
        (["RUN", "--task=knm"], "unknown task 'knm'; known: .* Did you mean 'knn'"),
        (["RUN", "--galery=3"], "unknown option 'galery'; lilt report --help lists all. Did you mean 'gallery'"),
        ([], "run"),
    ],
)
def test_errors_say_what_to_do(words: list[str], message: str, copied: Path, capsys: Any) -> None:
    argv = [word.replace("RUN", str(copied)) for word in words]
    assert re.search(message, refused(capsys, "report", *argv))
    assert not (copied / "report.html").exists()


def test_a_split_that_is_not_there_is_said_in_the_page(copied: Path, capsys: Any) -> None:
    capsys.readouterr()
    part = report(copied, "--split=tset").one(id="gallery")
    assert re.search("has no split 'tset'; it has: .* Did you mean 'test'", part.text)
    assert "not shown: gallery: " in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(copied: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import of something not installed finds
    said = refused(capsys, "report", str(copied))
    assert "a report needs matplotlib, which is not installed; pip install 'lilt[plot]'" in said
    assert not (copied / "report.html").exists()


def test_two_processes_write_the_same_page_once(copied: Path) -> None:
    report(copied)
    alone = read((copied / "report.html").read_text(encoding="utf-8"))
    words = ["report", copied, "--workers=0", "--overwrite=true"]
    torchrun(2, "-m", "lilt", *words)
    both = check_closed((copied / "report.html").read_text(encoding="utf-8"))
    ranks = [[a.attributes["data-rank"] for a in root.all("article")] for root in (alone, both)]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 8 + 6
