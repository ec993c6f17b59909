"""Numbers that a data set brings along."""

from __future__ import annotations

from pathlib import Path

import pytest

from lilt.data import read_references


def test_a_set_may_bring_numbers_for_a_split(tmp_path: Path) -> None:
    (tmp_path / "references.json").write_text('{"test": {"published": 26.1}}')
    assert read_references(tmp_path / "manifest.jsonl", "test") == {"published": 26.1}
    assert read_references(tmp_path / "manifest.jsonl", "val") == {}


def test_it_need_not(tmp_path: Path) -> None:
    assert read_references(tmp_path / "manifest.jsonl", "test") == {}


@pytest.mark.parametrize("text", ["{", "[1]", '{"test": 3}', '{"test": {"published": "high"}}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "references.json").write_text(text)
    with pytest.raises(ValueError, match=r"references\.json: .*; expected \{split: \{name: number\}\}"):
        read_references(tmp_path / "manifest.jsonl", "test")
