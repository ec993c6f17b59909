"""Gained, kept and lost of several runs: what `lilt evaluate --task` printed, read by `lilt compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lilt.cli import main
from lilt.report.conserved import grid_of, named, pieces
from lilt.report.findings import Kept
from tests.report.conftest import CONSERVE
from tests.report.test_compare import compared, rows, wide
from tests.report.test_page import check_closed
from tests.report.test_runs import refused

__all__ = ["wide"]


def evaluated(run: Path, file: Path, capsys: pytest.CaptureFixture[str], *specs: str) -> dict[str, Any]:
    """Write what the command prints into a file, and return it."""
    capsys.readouterr()
    assert main(["evaluate", str(run), "--workers=0", "--json", *(f"--task={spec}" for spec in specs)]) == 0
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8"))["tasks"])


@pytest.mark.usefixtures("wide")
def test_each_policy_is_a_row_of_what_was_kept(run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    one, two, page = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "all.html"
    tuned = evaluated(run, one, capsys, CONSERVE, "moved")[CONSERVE]
    frozen = evaluated(other, two, capsys, CONSERVE)[CONSERVE]
    found = rows(capsys, one, f"{other}/", two, f"--html={page}")  # a run need not be named beside its file
    assert [row["policy"] for row in found] == ["frozen", "lora(r=2)+layernorm"]
    assert [row["differs"] for row in found] == [[], []] and found[1]["mean_recall"] is not None
    for row, values in zip(found, (frozen, tuned), strict=True):
        assert row["conserved"] == [
            {
                "name": name.removesuffix("/before"),
                "before": value,
                "after": values[name.replace("/before", "/after")],
                "kept": values.get(name.replace("/before", "/kept")),
            }
            for name, value in values.items()
            if name.endswith("/before")
        ]
    head, *lines = table = check_closed(page.read_text(encoding="utf-8")).one(id="conservation").one("table").rows()
    assert head[:2] == ["policy", "knn/top1"] and [line[0] for line in lines] == ["frozen", "lora(r=2)+layernorm"]
    for values, line in zip((frozen, tuned), lines, strict=True):
        for name, cell in zip(head[1:], line[1:], strict=True):
            before, after, kept = (values.get(f"{name}/{state}") for state in ("before", "after", "kept"))
            assert cell.startswith(f"{before:.2f} → {after:.2f}")
            assert cell.endswith(f"{kept:.1f} %)") if kept is not None else "%" not in cell
    assert re.fullmatch(r"(\d+\.\d\d) → \1 \(● 100.0 %\)", lines[0][1])  # frozen towers have kept all
    said = compared(capsys, run, one, two)
    assert all(" ".join(cell.split()) in said for line in table for cell in line)
    assert said.count("gained") == 1 and "before → after of the towers" in said


def test_a_narrow_terminal_has_it_in_pieces(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.json"
    evaluated(run, file, capsys, CONSERVE)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", str(file)]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(name in text for name in ("knn/mean_per_class", "retrieval/mean_recall", "retrieval/image_to_text/R@5"))
    lines = [("policy", "a" * 30, "b" * 30, "c" * 100), ("p", "1", "2", "3")]
    assert list(pieces(lines, 80)) == [[0, 1, 2], [0, 3]]


def test_values_of_other_tasks_do_not_stand_in_one_column() -> None:
    one, two = Kept("knn/top1", 50, 60, 120.0), Kept("knn/top1", 40, 39, 97.5)
    same = named([[("conserve(knn)", one)], [("conserve(knn)", two)]])
    assert grid_of([("a", same[0]), ("b", same[1])]) == [
        ("policy", "knn/top1"), ("a", "50.00 → 60.00 (▲ 120.0 %)"), ("b", "40.00 → 39.00 (▼ 97.5 %)"),
    ]  # fmt: skip
    other = named([[("conserve(knn(k=5))", one)], [("conserve(knn)", two)]])
    assert grid_of([("a", other[0]), ("b", other[1])]) == [
        ("policy", "knn/top1 (conserve(knn(k=5)))", "knn/top1 (conserve(knn))"),
        ("a", "50.00 → 60.00 (▲ 120.0 %)", "-"),
        ("b", "-", "40.00 → 39.00 (▼ 97.5 %)"),
    ]


def test_files_that_say_nothing_of_it_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "x.json"
    evaluated(run, file, capsys, "moved")
    said = refused(capsys, "compare", str(run), str(file))
    assert "x.json has no values before and after (tasks: moved); expected those of conserve; write it anew" in said
    told = {"run": "hf:clip", "tasks": {"conserve(knn)": {"knn/top1/before": 1.0, "knn/top1/after": 1.0}}, "failed": {}}
    file.write_text(json.dumps(told), encoding="utf-8")
    said = refused(capsys, "compare", str(run), str(file))
    assert "says what was kept of hf:clip, which is no folder of a checkpoint here; expected one; compare from" in said
