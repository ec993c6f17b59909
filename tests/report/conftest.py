"""Two real runs on pictures with hostile captions, and the page of one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lilt.cli import main
from tests.report.dom import Node, read

HOSTILE = '<script>alert("{}")</script> & a $5 "{}" picture'
CONSERVE = r"conserve(knn(k=3,label_from=([a-z]+)\d)+retrieval)"
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def manifest(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures with a fourth caption each that would run a script in a careless page."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = []
    for line in (pictures / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        shutil.copyfile(pictures / record["image"], folder / record["image"])
        record["captions"].append(HOSTILE.format(record["image"], record["captions"][0].split()[1]))
        lines.append(json.dumps(record))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def train(tiny_vision: str, tiny_text: str, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run `lilt train` in a folder of that name and return it."""
    home = tmp_path_factory.mktemp("runs")

    def start(name: str, **more: object) -> Path:
        plain = {
            "vision": tiny_vision, "text": tiny_text, "data": manifest, "output": home / name, "batch_size": 6,
            "max_steps": 4, "eval_every": 1, "log_every": 1, "workers": 0, "projection": "linear(dim=16)",
        }  # fmt: skip
        assert main(["train", *(f"--{key}={value}" for key, value in (plain | more).items())]) == 0
        return home / name

    return start


@pytest.fixture(scope="session")
def run(train: Train) -> Path:
    """A finished run with a price."""
    return train("one", policy="lora(r=2)+layernorm", price=2)


@pytest.fixture(scope="session")
def other(train: Train) -> Path:
    """Another policy on the same towers and data."""
    return train("two", policy="frozen")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run without a page, to be written into and spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("report.html")))


@pytest.fixture(scope="session")
def written(run: Path) -> Path:
    """The page of the run, with tasks."""
    words = [f"--task={task}" for task in (CONSERVE, "moved", "retrieval(split=val)")]
    assert main(["report", str(run), "--gallery=6", "--workers=0", *words]) == 0
    return run / "report.html"


@pytest.fixture(scope="session")
def page(written: Path) -> Node:
    return read(written.read_text(encoding="utf-8"))
