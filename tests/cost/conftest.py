"""Runs of known length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilt.cli import main

Options = Callable[..., list[str]]
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def options(tiny_text: str, pictures: Path, tmp_path: Path) -> Options:
    """Options of a run on the slow tower: 40 pictures to train on, 20 to validate, 10 to test."""
    files = sorted(pictures.glob("*.png"))
    lines = []
    for number, split in enumerate(["train"] * 40 + ["val"] * 20 + ["test"] * 10):
        name = f"{number}.png"
        shutil.copyfile(files[number % len(files)], tmp_path / name)
        lines.append({"image": name, "captions": ["a red picture"], "split": split})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    plain = {
        "vision": "py:tests.cost.slow:vision", "text": tiny_text, "data": manifest, "projection": "linear(dim=16)",
        "batch_size": 8, "workers": 0, "epochs": 1,
    }  # fmt: skip

    def words(**more: Any) -> list[str]:
        return [f"--{key}={value}" for key, value in (plain | more).items()]

    return words


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """What `lilt cost … --json` prints, which is one JSON list and nothing else."""

    def answer(*argv: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["cost", *argv, "--json"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1
        rows: list[dict[str, Any]] = json.loads(printed)
        return rows

    return answer


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must end with status 2 and one message; return it."""
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())
