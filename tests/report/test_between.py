"""The way between base and tuned towers in a page: each value that was measured is drawn, and stands in a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilt.cli import main
from lilt.report.between import by_scale
from tests.report.test_page import tables
from tests.report.test_runs import report

KNN = r"knn(k=3,label_from=([a-z]+)\d)"
CURVE = f"curve({KNN}+retrieval,scales=1|0|0.5)"


@pytest.fixture
def found(copied: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """What the tasks say on the command line."""
    assert main(["evaluate", str(copied), "--workers=0", "--json", f"--task={CURVE}"]) == 0
    return dict(json.loads(capsys.readouterr().out)["tasks"][CURVE])


def test_a_curve_is_drawn(copied: Path, found: dict[str, float]) -> None:
    again = "curve(retrieval,scales=0|1)"  # two curves of one task, and what has places
    moved = "curve(moved,scales=0.5|1)"
    part = report(copied, "--gallery=0", f"--task={CURVE}", f"--task={again}", f"--task={moved}").one(id="conservation")
    figures = part.all("figure", class_="chart")
    assert [figure.one("figcaption").text for figure in figures] == [
        f"{CURVE}: knn, %", f"{CURVE}: retrieval, %", f"{again}: retrieval, %",
    ]  # fmt: skip
    knn, retrieval = (figure.one("svg") for figure in figures[:2])
    for drawing, task in ((knn, "knn"), (retrieval, "retrieval")):
        keys = [name.removeprefix(f"0/{task}/") for name in found if name.startswith(f"0/{task}/")]
        said = drawing.attributes["aria-label"].split("; ")
        assert said == [
            f"{key} {found[f'0/{task}/{key}']:.4g} at scale 0 to {found[f'1/{task}/{key}']:.4g} at scale 1"
            for key in keys
            if key.rpartition("/")[2] != "median_rank"
        ]
        texts = [node.text for node in drawing.all("text")]
        assert all(words.partition(" ")[0] in texts for words in said) and "scale (0: base towers, 1: tuned)" in texts
    # all numbers, also those that are no shares, are there to be read
    head, *rows = tables(part)[CURVE]
    assert head == ["scale", "0", "0.5", "1"]
    shown = {row[0]: row[1:] for row in rows}
    assert shown == {
        name.removeprefix("0/"): [f"{found[f'{s}/{name[2:]}']:.4g}" for s in ("0", "0.5", "1")]
        for name in found
        if name.startswith("0/")
    }
    assert "retrieval/text_to_image/median_rank" in shown
    assert tables(part)[moved][0] == ["scale", "0.5", "1"]


def test_what_is_drawn_stands_where_it_was_measured(copied: Path, found: dict[str, float]) -> None:
    """Of the lines in the picture: equal steps of scale are equal steps across, higher values stand higher."""
    figure = report(copied, "--gallery=0", f"--task={CURVE}").one(id="conservation").all("figure", class_="chart")[1]
    keys = [name[len("0/retrieval/") :] for name in found if name.startswith("0/retrieval/")]
    keys = [key for key in keys if not key.endswith("median_rank")]
    values = {key: [found[f"{scale}/retrieval/{key}"] for scale in ("0", "0.5", "1")] for key in keys}
    paths = [
        [float(word) for word in node.attributes["d"].replace("M", " ").replace("L", " ").split()]
        for node in figure.all("path")
        if node.attributes.get("d", "").count("L") == 2 and "clip-path" in node.attributes
    ]
    assert len(paths) == len(keys)
    heights = []
    for key, numbers in zip(keys, paths, strict=True):
        across, down = numbers[::2], numbers[1::2]
        assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=1e-3)
        heights += list(zip(values[key], down, strict=True))
    (low, bottom), (high, top) = min(heights), max(heights)
    assert high > low
    for value, height in heights:
        assert height == pytest.approx(bottom + (value - low) / (high - low) * (top - bottom), abs=0.01)


def test_a_task_that_goes_by_its_spec_may_hold_a_slash() -> None:
    labels = ["knn(data=/a/b)", "knn(data=/a)"]
    values = {"0/knn(data=/a/b)/top1": 1.0, "0.5/knn(data=/a/b)/top1": 2.0, "0/knn(data=/a)/top1": 3.0}
    assert by_scale(values, labels) == {labels[0]: {"top1": {0: 1.0, 0.5: 2.0}}, labels[1]: {"top1": {0: 3.0}}}
