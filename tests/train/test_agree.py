"""Ranks that would not train the same find out before the first step, and say who differs in what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lilt.train.agree import differences
from tests.test_distributed import ROOT, torchrun


@pytest.fixture(scope="module")
def results(tiny_vision: str, tiny_text: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agree")
    torchrun(2, ROOT / "tests" / "agree_run.py", tiny_vision, tiny_text, pictures, folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_another_manifest_is_noticed(results: Path, rank: int) -> None:
    said = (results / f"data.{rank}").read_text()
    assert re.match(r"rank 1 differs in captions 18 \(\w{12}\) instead of 18 \(\w{12}\)\. Expected all ranks to", said)
    assert not (results / "data" / "adapter.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_other_settings_are_named(results: Path, rank: int) -> None:
    said = (results / f"settings.{rank}").read_text()
    assert said.startswith("rank 1 differs in ")
    assert "--lr 0.0001 instead of None" in said
    assert "--batch_size 4 instead of 6" in said
    assert said.endswith("give all of them the same settings, and the same files and library versions on all machines")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_data_under_another_path_is_fine(results: Path, rank: int) -> None:
    assert (results / f"paths.{rank}").read_text() == "trained"


def test_the_odd_one_of_many_is_named() -> None:
    same = {"pairs": "10", "torch": "2.9"}
    assert differences([same] * 4) == ""
    assert differences([{**same, "pairs": "9"}, same, same]) == "rank 0 differs in pairs 9 instead of 10"
    assert differences([same, {"pairs": "10"}]) == "rank 1 differs in torch None instead of 2.9"
